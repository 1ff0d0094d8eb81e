"""Faults of a configuration, found before PyTorch is imported or any model is built."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STAGE_KEYS = (
    "module", "parts", "objectives", "max_steps", "batch_size", "new", "dropped", "data", "collate", "evaluation", "samples",
    "encoder", "middleware", "decoder", "optimizer", "scheduler", "trainer",
)  # fmt: skip


class ConfigError(ValueError):
    """All faults that were found, one a line."""

    def __init__(self, faults: Iterable[str]) -> None:
        super().__init__("\n".join(faults))


def suggestion(word: str, choices: Iterable[str]) -> str:
    """`did you mean ...? valid choices: ...`"""
    choices = list(choices)
    near = difflib.get_close_matches(str(word), choices, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid choices: {', '.join(choices)}"


def check_config(config: Mapping[str, Any]) -> None:
    """Check what can be checked without building anything.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is valid.
    """
    faults = [*_pipeline_faults(config), *_start_faults(config)]
    for name in config["pipeline"]:
        if name in config["stages"]:
            faults += [f"stages.{name}: {fault}" for fault in _stage_faults(config, config["stages"][name])]
    if faults:
        raise ConfigError(faults)


def _pipeline_faults(config: Mapping[str, Any]) -> Iterable[str]:
    pipeline, stages = config["pipeline"], config["stages"]
    if not pipeline:
        yield f"pipeline is empty; {suggestion('', stages)}"
    for name in pipeline:
        if name not in stages:
            yield f"pipeline: there is no stage {name!r}; {suggestion(name, stages)}"
    for name in {n for n in pipeline if list(pipeline).count(n) > 1}:
        yield f"pipeline: stage {name!r} is listed twice; give the second one a name of its own under stages"


def _start_faults(config: Mapping[str, Any]) -> Iterable[str]:
    if not isinstance(config["seed"], int) or config["seed"] < 0:
        yield f"seed={config['seed']!r} must be a whole number from 0 on"
    start = config.get("init_from")
    if start and config.get("resume"):
        yield (
            f"init_from={start} and resume={config['resume']} exclude each other: init_from starts a new run from weights, "
            "resume goes on with an old run as it was"
        )
    elif start and ("/" in str(start) or str(start).startswith(".")) and not Path(start).exists():
        yield f"init_from={start}: there is no such file or folder (a run, a hand-off folder, or a checkpoint is expected)"


def _stage_faults(config: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterable[str]:
    for key in stage:
        if key not in STAGE_KEYS:
            yield f"{key!r} is no setting of a stage; {suggestion(key, STAGE_KEYS)}"
    for key in ("max_steps", "batch_size"):
        yield from _not_positive(key, stage.get(key), whole=True)
    if not stage.get("module", {}).get("train"):
        yield "module.train is empty: the stage would train nothing; name parts, e.g. [encoder, middleware]"
    for part in stage["parts"]:
        if part not in ("encoder", "middleware", "decoder"):
            yield f"parts: {part!r} is no part; {suggestion(part, ('encoder', 'middleware', 'decoder'))}"
    optimizer = {**config["optimizer"], **(stage.get("optimizer") or {})}
    yield from _not_positive("optimizer.lr", optimizer.get("lr"))
    for pattern, rate in (optimizer.get("part_lr") or {}).items():
        yield from _not_positive(f"optimizer.part_lr[{pattern}]", rate)
    decay = optimizer.get("weight_decay", 0.0)
    if not isinstance(decay, int | float) or decay < 0:
        yield f"optimizer.weight_decay={decay!r} must be a number from 0 on"
    warmup = {**config["scheduler"], **(stage.get("scheduler") or {})}.get("warmup_steps", 0)
    if not isinstance(warmup, int) or warmup < 0:
        yield f"scheduler.warmup_steps={warmup!r} must be a whole number from 0 on"


def _not_positive(name: str, value: Any, whole: bool = False) -> Iterable[str]:
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
        yield f"{name}={value!r} must be a {'whole ' if whole else ''}number above 0"
