"""A finished run, opened for use: the model with its weights, and how it saw pictures and text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from lightning_internvl.assembly import Config, View, make_view, stage_settings
from lightning_internvl.checkpoints import handoff
from lightning_internvl.checkpoints.origin import handoff_of
from lightning_internvl.compose import Build
from lightning_internvl.files import RUN_CONFIG, read_json


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
    run_of(folder)
    model, tokenizers, _ = handoff.load(folder)
    settings = settings_of(folder)
    return Opened(make_view(settings, model, tokenizers, build), settings, folder)


def settings_of(folder: Path) -> Config:
    """The settings of the stage that wrote a hand-off folder, from the run around it; raises ValueError as `run_of`."""
    config = yaml.safe_load((run_of(folder) / RUN_CONFIG).read_text(encoding="utf-8"))
    return stage_settings(config, read_json(folder / handoff.MANIFEST)["stage"])


def run_of(folder: Path) -> Path:
    """The run around a hand-off folder.

    Raises:
        ValueError: if there is none.
    """
    run = folder.resolve().parents[1]
    if not (run / RUN_CONFIG).is_file():
        raise ValueError(f"{folder} is no hand-off folder inside a run: {run / RUN_CONFIG} is missing")
    return run
