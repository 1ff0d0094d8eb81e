"""How many processes a configuration asks for, whether they fit the strategy, and how a run goes on with another number."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_internvl.launch import started_from_outside

HARDWARE = ("devices", "num_nodes", "accelerator")  # of the trainer; a run may go on with others
Config = Mapping[str, Any]


def processes(trainer: Config) -> int | None:
    """Processes that a trainer runs in; None where that depends on the machine (`devices: auto`)."""
    devices = trainer.get("devices", 1)
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else None
    return None if not count else count * (trainer.get("num_nodes") or 1)


def trainer_of(config: Config, stage: str) -> dict[str, Any]:
    """The trainer's settings of a stage."""
    return {**config["trainer"], **(config["stages"][stage].get("trainer") or {})}


def hardware_faults(config: Config) -> Iterable[str]:
    """Numbers of processes that do not fit each other."""
    strategy, target = config["strategy"], str(config["strategy"].get("_target_"))
    groups, layers = strategy.get("data_parallel_size"), strategy.get("tensor_parallel_size", 1)
    if target.endswith(".FSDP2") and "adamw_8bit" in str(config["optimizer"].get("_target_")):
        yield "optimizer=adamw_8bit cannot divide its state, as strategy=fsdp2 needs it; use optimizer=adamw, or strategy=ddp"
    for stage in config["pipeline"]:
        trainer = trainer_of(config, stage)
        count = processes(trainer)
        asked = f"trainer.devices={trainer.get('devices', 1)} x trainer.num_nodes={trainer.get('num_nodes') or 1}"
        if isinstance(groups, int) and count is not None and groups * layers != count:
            yield (
                f"strategy.data_parallel_size={groups} x tensor_parallel_size={layers} differs from the {count} processes of "
                f"{asked}; leave data_parallel_size at auto, or give {count}"
            )
            return
        if started_from_outside() and not config["plan"] and count not in (None, _started()):
            yield f"{_started()} processes were started, but {asked} says {count}; let both agree"
            return


def _started() -> int:
    """Processes that torchrun, srun or a script has started."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def elsewhere(config: Config, changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a run that goes on with other hardware, and what is to be said about it.

    Each device reads so many samples that a step still reads those it would have read.

    Args:
        changes: settings of the trainer, of `HARDWARE`; they hold for all stages.

    Raises:
        ValueError: for a number of processes that is not known, or that does not divide the samples of a step.
    """
    found, told = copy.deepcopy(dict(config)), []
    found["trainer"] |= changes
    for name in config["pipeline"]:
        stage = found["stages"][name]
        stage["trainer"] = {k: v for k, v in (stage.get("trainer") or {}).items() if k not in changes}
        before, now = processes(trainer_of(config, name)), processes(trainer_of(found, name))
        if before is None or now is None:
            raise ValueError("resume on other hardware needs numbers: trainer.devices=N, where the run had a number too")
        samples = stage["batch_size"] * before
        if samples % now:
            fitting = ", ".join(str(n) for n in range(1, samples + 1) if samples % n == 0)
            raise ValueError(
                f"stages.{name}: a step reads {samples} samples, which {now} processes cannot share evenly; fitting numbers of "
                f"processes (devices x nodes): {fitting}"
            )
        if now != before:
            told.append(
                f"{name}: {now} processes instead of {before}, batch_size {stage['batch_size']} -> {samples // now}: each step "
                "reads the same samples in the same order; what chance draws on a device (masks, wrong captions) changes"
            )
        stage["batch_size"] = samples // now
    return found, told
