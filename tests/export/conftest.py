"""Small runs that have finished, written without training: what a recipe composes to, and the hand-off of fresh weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from export_toys import write_run

from lightning_internvl.config.targets import build
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.export.write import export
from lightning_internvl.inference.load_run import open_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function of a recipe and overrides that writes the run of its last stage, with all weights drawn anew."""
    return lambda experiment, *overrides, name="run": write_run(tmp_path / name, experiment, *overrides)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, ExportReport]]:
    """A function of a recipe and options that exports its run: the folder, which tests only read, and the report."""
    made: dict[str, tuple[Path, ExportReport]] = {}

    def write(experiment: str, *overrides: str, **options: object) -> tuple[Path, ExportReport]:
        asked = ExportOptions(**options)
        key = repr((experiment, overrides, asked))
        if key not in made:
            place = tmp_path_factory.mktemp(experiment)
            run = write_run(place / "run", experiment, *overrides)
            made[key] = place / "out", export(open_run(run, build), place / "out", asked)
        return made[key]

    return write
