"""How many processes are asked for, whether they fit, and going on with other numbers."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_internvl.choices import trained_stages
from lightning_internvl.launch import started_from_outside, started_processes

HARDWARE = ("devices", "num_nodes", "accelerator")  # of the trainer; a run may go on with others
INSTEAD = "use strategy=fsdp2, which does as {0}, with strategy.reshard_after_forward=false as {1}"
# strategies of Lightning by the beginnings of their names, why stages cannot use them, and what
# does the same
REFUSED = {
    "fsdp": (
        "FSDP 1 lays weights out flat and renames their modules, but a stage freezes, decays and hands over by name and shape; "
        + INSTEAD.format("FULL_SHARD", "SHARD_GRAD_OP")
    ),
    "deepspeed": (
        "DeepSpeed's checkpoints are read by as many processes as have written them, and its engine keeps weights in a layout of "
        "its own, so that resume, freezing within a stage and the hand-off would not be exact; "
        + INSTEAD.format("ZeRO 3", "ZeRO 2")
    ),
}
HALVES = ("bf16-true", "16-true")  # precisions of a trainer
Config = Mapping[str, Any]


def processes(trainer: Config) -> int | None:
    """Processes of a trainer; None where that depends on the machine (`devices: auto`)."""
    devices = trainer.get("devices", 1)
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else None
    return None if not count else count * (trainer.get("num_nodes") or 1)


def data_workers(asked: int | str, trainer: Config) -> int:
    """Processes that prepare samples for each process of a trainer: `auto` gives all of them
    together the cores that training leaves, at most 8 to each and at least one."""
    if asked != "auto":
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = (processes(trainer) or 1) // (trainer.get("num_nodes") or 1)
    return max(1, min(8, cores // max(1, here) - 1))


def readers(config: Config, stage: str) -> int | None:
    """Processes of a stage that read samples of their own."""
    count = processes(trainer_of(config, stage))
    return count and count // config["strategy"].get("tensor_parallel_size", 1)


def trainer_of(config: Config, stage: str) -> dict[str, Any]:
    """The trainer's settings of a stage."""
    return {**config["trainer"], **(config["stages"][stage].get("trainer") or {})}


def strategy_refusal(strategy: str) -> str | None:
    """Why stages cannot use a strategy (name or class) of Lightning, and what does the same."""
    name = strategy.rpartition(".")[2].lower()
    found = re.fullmatch(rf"({'|'.join(REFUSED)})(_\w+|strategy)?", name)
    return found and f"strategy={strategy}: {REFUSED[found[1]]}"


def precision_faults(config: Config) -> Iterable[str]:
    """Precisions in which weights would not learn."""
    for stage in trained_stages(config):
        precision = trainer_of(config, stage).get("precision")
        if precision in HALVES:
            own = (config["stages"][stage].get("trainer") or {}).get("precision")
            where = f"stages.{stage}.trainer" if own else "trainer"
            mixed = str(precision).replace("true", "mixed")
            fault = "holds weights and moments in 16 bits, where a step smaller than a weight's last digit is lost"
            yield f"{where}.precision={precision} {fault}; use {mixed}, which computes in 16 bits over weights in float32"
            if not own:
                return


def hardware_faults(config: Config) -> Iterable[str]:
    """A strategy that stages cannot use, and numbers of processes that do not fit each other."""
    strategy, target = config["strategy"], str(config["strategy"].get("_target_"))
    # A share of each layer is held by the processes of a group, which read the same samples.
    groups, layers = strategy.get("data_parallel_size"), strategy.get("tensor_parallel_size", 1)
    if refused := strategy_refusal(str(strategy.get("_target_") or strategy.get("name"))):
        yield refused
        return
    for stage in config["pipeline"] if target.endswith(".FSDP2") else []:
        own = (config["stages"][stage].get("optimizer") or {}).get("_target_")
        if "adamw_8bit" in str(own or config["optimizer"].get("_target_")):
            where = f"optimizer@stages.{stage}.optimizer" if own else "optimizer"
            fault = f"{where}=adamw_8bit cannot divide its state, as strategy=fsdp2 needs it"
            yield f"{fault}; use {where}=adamw, or strategy=ddp"
            if not own:
                break
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
        if count is not None and isinstance(layers, int) and layers > 0 and count % layers:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            setting = f"strategy.tensor_parallel_size={layers}"
            yield f"{setting} does not divide the {count} processes of {asked}; valid choices: {fitting}"
            return
        if started_from_outside() and not config["plan"] and count not in (None, started_processes()):
            yield f"{started_processes()} processes were started, but {asked} says {count}; let both agree"
            return


def with_hardware(config: Config, changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a run that goes on with other hardware, and what is to be said about it.

    Each device reads so many samples that a step still reads those it would have read.

    Args:
        changes: settings of the trainer, of `HARDWARE`; they hold for all stages.

    Raises:
        ValueError: for a number of processes that is not known, or that does not divide the samples
            of a step.
    """
    found, messages, layers = copy.deepcopy(dict(config)), [], config["strategy"].get("tensor_parallel_size", 1)
    found["trainer"] |= changes
    for name in trained_stages(config):
        stage = found["stages"][name]
        own = stage.get("trainer") or {}
        stage["trainer"] = {key: own[key] for key in own if key not in changes}
        before, now = readers(config, name), readers(found, name)
        if before is None or now is None:
            needs = "trainer.devices=N, where the run had a number too"
            raise ValueError(f"resume on other hardware needs numbers: {needs}")
        samples, all_before, all_now = stage["batch_size"] * before, before * layers, now * layers
        if samples % now:
            fitting = ", ".join(str(n * layers) for n in range(1, samples + 1) if samples % n == 0)
            raise ValueError(
                f"stages.{name}: a step reads {samples} samples, which {all_now} processes cannot "
                f"share evenly; fitting numbers of processes (devices x nodes): {fitting}"
            )
        if now != before:
            messages.append(
                f"{name}: {all_now} processes instead of {all_before}, batch_size "
                f"{stage['batch_size']} -> {samples // now}: each step reads the same samples in "
                "the same order; what chance draws on a device (masks, wrong captions) changes"
            )
        stage["batch_size"] = samples // now
    return found, messages
