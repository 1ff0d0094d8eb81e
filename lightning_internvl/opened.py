"""A finished run, opened for use: the model with its weights, and how it saw pictures and text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from lightning_internvl.assembly import Config, View, make_view, stage_settings
from lightning_internvl.checkpoints import handoff
from lightning_internvl.compose import Build
from lightning_internvl.files import RUN_CONFIG


class Opened(NamedTuple):
    """A model in evaluation mode with its collators (`view`), the settings of the stage that trained it, and its hand-off."""

    view: View
    settings: Config
    folder: Path


def open_run(place: str | Path, build: Build) -> Opened:
    """The last finished stage of a run, or the stage of a hand-off folder inside one.

    Raises:
        ValueError: if this is neither, or no stage of the run has finished; as `handoff.load_model`.
    """
    folder = handoff_of(Path(place))
    run = folder.resolve().parents[1] / RUN_CONFIG
    if not run.is_file():
        raise ValueError(f"{folder} is no hand-off folder inside a run: {run} is missing")
    model, tokenizers, manifest = handoff.load(folder)
    settings = stage_settings(yaml.safe_load(run.read_text(encoding="utf-8")), manifest["stage"])
    return Opened(make_view(settings, model, tokenizers, build), settings, folder)


def handoff_of(place: Path) -> Path:
    """A hand-off folder itself, or that of the last finished stage of a run.

    Raises:
        ValueError: if this is neither, or no stage has finished.
    """
    if (place / handoff.MANIFEST).is_file():
        return place
    if not (place / RUN_CONFIG).is_file():
        raise ValueError(f"{place} is neither a run ({RUN_CONFIG}) nor a hand-off folder ({handoff.MANIFEST})")
    pipeline = yaml.safe_load((place / RUN_CONFIG).read_text(encoding="utf-8"))["pipeline"]
    finished = [stage for stage in pipeline if (place / "handoff" / stage / handoff.MANIFEST).is_file()]
    if not finished:
        raise ValueError(f"{place}: no stage of this run has finished; use resume={place} to go on with it")
    return place / "handoff" / finished[-1]
