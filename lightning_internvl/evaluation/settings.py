"""Faults of the settings in conf/evaluate.yaml, found before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.checks import ConfigError, suggestion

DTYPES = ("float32", "bfloat16", "float16")
READING = ("template", "system", "tokenizer", "pictures")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check what can be checked without building anything.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is valid.
    """
    if faults := [*_source_faults(settings), *_task_faults(settings), *_number_faults(settings)]:
        raise ConfigError(faults)


def folder_of(settings: Mapping[str, Any]) -> Path:
    """Where the results go: `to`, or a folder beside the model that is measured."""
    if settings["to"] is not None:
        return Path(str(settings["to"]))
    if settings["run"] is not None:
        return Path(str(settings["run"])) / "evaluation"
    return Path("outputs") / "evaluation" / str(settings["model"]).strip("/").replace("/", "--")


def _source_faults(settings: Mapping[str, Any]) -> Iterable[str]:
    run, model = settings["run"], settings["model"]
    if run is None and model is None:
        runs = sorted(str(path.parent) for path in Path("outputs").glob("*/*/handoff"))
        yield f"nothing to measure; give run=FOLDER (runs here: {', '.join(runs[-5:]) or 'none'}) or model=FOLDER_OR_ID"
    if run is not None and model is not None:
        yield f"run={run} and model={model} exclude each other; leave one out"
    if run is not None and not Path(str(run)).is_dir():
        yield f"run={run}: there is no such folder"
    if model is None and (given := [name for name in READING if settings[name] is not None]):
        yield f"{', '.join(given)}: a run knows how it reads; only with model="


def _task_faults(settings: Mapping[str, Any]) -> Iterable[str]:
    tasks = settings.get("task")
    if not tasks:
        yield "task=[] measures nothing; name files of conf/task/, as in task=scenes or task=[vqa,pope]"
        return
    for name, task in tasks.items():
        if not isinstance(task, Mapping) or "_target_" not in task:
            yield f"task.{name}={task!r} is no task; choose it first, as in task=[{name}] task.{name}.SETTING=VALUE"
            continue
        if "version" not in task:
            yield f"task.{name} has no version; a score says by which version of its task it was found"
        for setting in ("samples", "max_new_tokens", "beams"):
            if task.get(setting) is not None:
                yield from _least(f"task.{name}.{setting}", task[setting], 1)
        if "max_missing" in task:
            yield from _share(f"task.{name}.max_missing", task["max_missing"])


def _number_faults(settings: Mapping[str, Any]) -> Iterable[str]:
    if settings["dtype"] not in DTYPES:
        yield f"dtype={settings['dtype']!r} is not known; {suggestion(settings['dtype'], DTYPES)}"
    if settings["samples"] is not None:
        yield from _least("samples", settings["samples"], 1)
    yield from _least("batch_size", settings["batch_size"], 1)
    yield from _least("cases", settings["cases"], 0)
    yield from _share("max_missing", settings["max_missing"])


def _least(name: str, value: Any, least: int) -> Iterable[str]:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        yield f"{name}={value!r} must be a whole number from {least} on"


def _share(name: str, value: Any) -> Iterable[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        yield f"{name}={value!r} must be a share from 0 to 1"
