"""How long stages are that are given in epochs: passes over the data, in steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from lightning_internvl.choices import IGNORE_INDEX, Config, trained_stages
from lightning_internvl.config.hardware import processes
from lightning_internvl.config.stage_settings import StageSettings, settings_of_stage
from lightning_internvl.console import console
from lightning_internvl.data.collate.packing import PACKED
from lightning_internvl.data.module import StageData
from lightning_internvl.messages import ConfigError
from lightning_internvl.model.compose import Build

LOOKED_AT = 16  # records whose tokens are counted
FEW = 10  # held-out records that say little
MORE = "\nSo few held-out records say little; data.validation=0.2 holds a fifth out, or give a file"
NO_MORE = "none held out, so that nothing is measured (data.validation)"
BOTH = "both say how long to train; set one of them to null"
INSTEAD = "give max_steps=N, the number of optimizer steps"


def with_lengths(config: Mapping[str, Any], build: Build) -> Config:
    """The configuration in which every stage of the pipeline has its `max_steps`.

    A warm-up of more than half of a stage in epochs is shortened to a tenth of it, which is
    printed.

    Raises:
        ConfigError: for epochs of data whose size is not known.
        ValueError: for data that cannot be read.
    """
    found = copy.deepcopy(dict(config))
    for name in trained_stages(found):
        stage = found["stages"][name]
        epochs, steps = stage.get("epochs"), stage.get("max_steps")
        if epochs is None:
            continue
        if steps is not None:
            raise ConfigError([f"stages.{name}: {epochs=} and max_steps={steps} {BOTH}"])
        settings = settings_of_stage(found, name, stage)
        stage["max_steps"] = steps = _steps(settings, epochs, build)
        warmup, tenth = settings.scheduler.get("warmup_steps") or 0, steps // 10
        if 2 * warmup > steps:
            stage["scheduler"] = {**(stage.get("scheduler") or {}), "warmup_steps": tenth}
            replaced = f"scheduler.warmup_steps {tenth} in place of {warmup}"
            console.print(f"{name}: {replaced}, for {steps} steps in all", soft_wrap=True)
    return found


def describe_length(settings: StageSettings, data: StageData) -> str:
    """How many records a stage has, and how long it trains on them; nothing of data without an
    end."""
    if not (records := data.records):
        return ""
    steps, samples = settings.max_steps, samples_of_step(settings)
    held_out = 0 if data.held_out is None else len(data.held_out)
    apart = f"{held_out:,} held out" if held_out else NO_MORE
    length = f"{steps:,} steps of {samples} "
    length += "rows" if settings.packing == PACKED else f"records = {steps * samples / records:.3g} epochs"
    line = f"{settings.name}: {records:,} records to train on, {apart}; {length}"
    return line + _described_tokens(data, records) + (MORE if 0 < held_out < FEW else "")


def _described_tokens(data: StageData, records: int) -> str:
    """Tokens of conversations, from the first ones that are trained on."""
    looked = min(records, LOOKED_AT)
    try:
        rows = [one["row"] for one in data.first(looked) if "row" in one]
    except ValueError:  # of samples that cannot be used; training names them
        return ""
    if not rows:
        return ""
    tokens = sum(len(ids) for ids, _ in rows) / looked
    learnt = sum(label != IGNORE_INDEX for _, labels in rows for label in labels) / looked
    how = "all were counted" if looked == records else f"estimated from {looked} records"
    each = f"{tokens:,.0f} tokens a record, {learnt:,.0f} of them learnt"
    return f"; {each}, {tokens * records:,.0f} an epoch ({how})"


def samples_of_step(settings: StageSettings) -> int:
    """Samples that an optimizer step reads on all processes; of packed rows the rows."""
    count = processes(settings.trainer.node) or max(1, torch.cuda.device_count())
    count //= settings.strategy.get("tensor_parallel_size", 1)
    return settings.batch_size * settings.trainer.accumulate_grad_batches * count


def _steps(settings: StageSettings, epochs: float, build: Build) -> int:
    """Optimizer steps of a stage that is given in epochs."""
    said, name = f"{epochs=}", f"stage {settings.name}"
    if settings.data.endless:
        raise ConfigError([f"{said}: {name} reads data without an end; {INSTEAD}"])
    dataset = build(settings.data.dataset(settings.reads))
    if not hasattr(dataset, "__len__"):
        raise ConfigError([f"{said}: {name} reads a stream, whose size is not known; {INSTEAD}"])
    records, samples = len(dataset), samples_of_step(settings)
    if settings.packing == PACKED:
        why = "packed rows hold as many records as fit, so that no epoch is known in steps"
        instead = f"{INSTEAD} ({math.ceil(records / samples)} or fewer an epoch)"
        raise ConfigError([f"{said}: {why}; {instead}, or data.packing=bucketed"])
    if records == 0:
        raise ConfigError([f"{name} has nothing to train on: the data holds no record"])
    return max(1, math.ceil(epochs * records / samples))
