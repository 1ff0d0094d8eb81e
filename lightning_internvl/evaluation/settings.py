"""Faults of the settings in conf/evaluate.yaml, found before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_internvl.choices import Config
from lightning_internvl.config.model_source import ModelSource, running_faults, source_faults
from lightning_internvl.messages import ConfigError, number_faults


@dataclass(frozen=True)
class EvaluationSettings(ModelSource):
    """The settings of conf/evaluate.yaml that are read when a model is measured."""

    task: dict[str, Config]
    record: str | None
    cases: int
    batch_size: int


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check what can be checked without building anything.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is valid.
    """
    if faults := [*source_faults(settings, "nothing to measure"), *_task_faults(settings), *_number_faults(settings)]:
        raise ConfigError(faults)


def folder_of(settings: Mapping[str, Any]) -> Path:
    """Where the results go: `to`, or a folder beside the model that is measured."""
    if settings["to"] is not None:
        return Path(str(settings["to"]))
    if settings["run"] is not None:
        return Path(str(settings["run"])) / "evaluation"
    return Path("outputs") / "evaluation" / str(settings["model"]).strip("/").replace("/", "--")


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
                yield from number_faults(f"task.{name}.{setting}", task[setting], least=1, whole=True)
        if "max_missing" in task:
            yield from _share(f"task.{name}.max_missing", task["max_missing"])


def _number_faults(settings: Mapping[str, Any]) -> Iterable[str]:
    yield from running_faults(settings)
    if settings["samples"] is not None:
        yield from number_faults("samples", settings["samples"], least=1, whole=True)
    yield from number_faults("batch_size", settings["batch_size"], least=1, whole=True)
    yield from number_faults("cases", settings["cases"], least=0, whole=True)
    yield from _share("max_missing", settings["max_missing"])


def _share(name: str, value: Any) -> Iterable[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        yield f"{name}={value!r} must be a share from 0 to 1"
