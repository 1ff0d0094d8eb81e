"""A finished run, opened for use: the model with its weights, and how it saw pictures and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lightning_internvl.checkpoints import handoff, load_handoff
from lightning_internvl.checkpoints.weight_source import handoff_of
from lightning_internvl.config.shapes import check_run_shapes
from lightning_internvl.config.stage_settings import StageSettings, stage_settings
from lightning_internvl.config.targets import locate, with_current_targets
from lightning_internvl.config.trust import Untrusted, check_run, is_trusted, targets_of
from lightning_internvl.data.files.labelled_folder import HeldOutFolder
from lightning_internvl.data.processors.basic import Processor
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.files import RUN_CONFIG, parsed_yaml, read_json
from lightning_internvl.inference.collators import View, make_view
from lightning_internvl.model.compose import Build

TASKS = "lightning_internvl.evaluation"  # what measures


class LoadedRun(NamedTuple):
    """A model in evaluation mode with its collators (`view`), the settings of the stage that
    trained it, and its hand-off."""

    view: View
    settings: StageSettings
    folder: Path


def open_run(place: str | Path, build: Build) -> LoadedRun:
    """The last finished stage of a run, or the stage of a hand-off folder inside one.

    Raises:
        ValueError: if this is neither, or no stage of the run has finished; as
            `handoff.load_model`.
    """
    folder = handoff_of(Path(place))
    run_of(folder)
    model, tokenizers, _ = load_handoff.load(folder)
    settings = settings_of(folder)
    return LoadedRun(make_view(settings, model, tokenizers, build), settings, folder)


def settings_of(folder: Path) -> StageSettings:
    """The settings of the stage that wrote a hand-off folder, from the run around it.

    Raises:
        ValueError: as `run_of`; for what the run names and the user does not trust (see
            `lightning_internvl.config.trust`).
    """
    run = run_of(folder)
    config = with_current_targets(parsed_yaml((run / RUN_CONFIG).read_text(encoding="utf-8")))
    check_run_shapes(config, run / RUN_CONFIG)
    check_run(config, run)
    stage = read_json(folder / handoff.MANIFEST).get("stage")
    if stage not in list(config["stages"]):
        raise ValueError(
            f"{folder / handoff.MANIFEST}: stage={stage!r} is none of {run / RUN_CONFIG}: {', '.join(config['stages'])}"
        )
    settings = stage_settings(config, stage)
    _check_roles(settings, run)
    return settings


def _check_roles(settings: StageSettings, run: Path) -> None:
    data, processors = settings.data, (Processor,)
    check_kind("data.processor", data.processor, processors, run)
    check_kind("data.eval_processor", data.eval_processor, processors, run)
    check_kind("collate.processor", settings.collate.get("processor"), processors, run)
    check_kind("data.held_out", data.held_out, (HeldOutScenes, HeldOutFolder), run)
    for name, task in settings.evaluation.items():
        check_kind(f"evaluation.{name}", task, (TASKS,), run)


def check_kind(path: str, node: Any, kinds: tuple[type | str, ...], place: Path) -> None:
    """Refuse what is this project's own but stands in a place where it is not used: one that reads
    data could fetch some.

    Args:
        path: of the node, for messages.
        node: a configuration that comes with `place`; its values are plain.
        kinds: classes, or packages in which all classes will do.

    Raises:
        Untrusted: for a class of another kind that the user does not trust, at any depth.
    """
    target = (node or {}).get("_target_")
    if target is None or is_trusted(target):
        return
    names = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in kinds)
    if not any(_is_of(target, kind) for kind in kinds):
        fault = f"{target!r} comes with the run and is none of {names}; it is not run"
        raise Untrusted([f"{place}: {path}._target_: {fault}"])
    if inner := targets_of([value for key, value in node.items() if key != "_target_"]):
        fault = f"{', '.join(sorted(inner))} come with the run, where plain values stand"
        raise Untrusted([f"{place}: {path}: {fault}; they are not run"])


def _is_of(target: str, kind: type | str) -> bool:
    if isinstance(kind, str):
        return target.startswith(f"{kind}.")
    found = locate(target)
    return isinstance(found, type) and issubclass(found, kind)


def run_of(folder: Path) -> Path:
    """The run around a hand-off folder.

    Raises:
        ValueError: if there is none.
    """
    run = folder.resolve().parents[1]
    if not (run / RUN_CONFIG).is_file():
        missing = run / RUN_CONFIG
        raise ValueError(f"{folder} is no hand-off folder inside a run: {missing} is missing")
    return run
