"""A score measured again from its record.json, and compared with what the record says.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.choices import Config
from lightning_internvl.config.consent import place_faults
from lightning_internvl.config.model_source import READING, ModelSource
from lightning_internvl.config.trust import Untrusted, check_run, trusting
from lightning_internvl.messages import ConfigError, first_of

KEPT = ("device", "dtype", "matmul_precision", "batch_size")  # what else rounding depends on
PLACES = ("model", "tokenizer", "encoder", "decoder")  # that may be on the hub
TOLD = 3  # numbers that differ, in messages


def how_asked(settings: Any, place: str) -> Config:
    """What a record says of the command that made it, beside the settings of its task.

    Args:
        settings: typed settings of the command.
        place: of the model that was measured.
    """
    given = {name: value for name, value in settings.reading.items() if value is not None}
    source = {"run": place} if settings.run is not None else {"model": place, **given}
    return source | {name: getattr(settings, name) for name in KEPT}


def with_record(settings: Config) -> Config:
    """The settings of a command with `record=PATH`: those of the record, results beside it unless
    `to` says otherwise. Others come back as they are.

    Raises:
        ConfigError: for a file that is no record of a score, settings that the record has,
            classes that are neither this project's nor trusted, and hub ids that are neither
            trusted nor on this machine.
    """
    if settings["record"] is None:
        return settings
    path = Path(str(settings["record"]))
    source = ModelSource.of(settings)
    given = {"run": source.run, "model": source.model, **source.reading}
    vain = [name for name, value in given.items() if value is not None]
    vain += ["task"] if list(settings["task"]) != ["scenes"] else []
    if vain:
        raise ConfigError([f"record={path} says the {', '.join(vain)}; leave them out"])
    record = read_record(path)
    name, own = str(record["task"]).partition("/")[0], dict(record["settings"])
    own.pop("tasks", None)  # of a stage, whose hand-off folder says them again
    asked = {key: value for key, value in record["asked"].items() if key in ("run", "model", *READING, *KEPT)}
    try:
        with trusting(settings["trust"] or ()):
            check_run({"task": {name: own}}, path)
            faults = [fault for key in PLACES for fault in place_faults(f"asked.{key}", asked.get(key))]
    except Untrusted as error:
        faults = [str(error)]
    if faults:
        raise ConfigError(faults)
    to = settings["to"] if settings["to"] is not None else str(path.parent / "replay")
    return {**settings, **asked, "task": {name: own}, "to": to}


def read_record(path: Path) -> Config:
    """A record.json; raises ConfigError for another file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"record={path} cannot be read: {error}"]) from error
    wanted = {"task": str, "settings": Mapping, "asked": Mapping, "model": Mapping, "metrics": Mapping}
    lacking = [key for key, kind in wanted.items() if not isinstance(found, Mapping) or not isinstance(found.get(key), kind)]
    if lacking or "_target_" not in found["settings"]:
        fault = f"it has no {', '.join(lacking) or 'settings._target_'}"
        raise ConfigError([f"record={path} is no record of a finished score: {fault}; give TASK/record.json of evaluate.py"])
    return found


def check_replay(record: Config, again: Config, path: str) -> str:
    """A sentence that says that a score is that of its record.

    Args:
        again: the record of the score that was measured now.

    Raises:
        ValueError: if the weights or a number differ, with both values of some.
    """
    if record["model"].get("weights") != again["model"]["weights"]:
        raise ValueError(f"{path}: the weights of {again['model']['place']} are others than those of the record")
    before, now = record["metrics"], again["metrics"]
    pairs = {name: (before.get(name), now.get(name)) for name in before | now}
    # by their texts, in which NaN is itself
    differ = [f"{name}: {then} then, {value} now" for name, (then, value) in pairs.items() if repr(then) != repr(value)]
    if differ:
        raise ValueError(f"{path}: {len(differ)} of {len(before)} numbers differ; {first_of(differ, TOLD)}")
    return f"all {len(before)} numbers are those of {path}, to the last digit"
