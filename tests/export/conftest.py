"""Small runs that have finished, written without training: what a recipe composes to, and the hand-off of fresh weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.assembly import stage_settings
from lightning_internvl.checkpoints import handoff
from lightning_internvl.cli import CONF, build
from lightning_internvl.compose import compose_model
from lightning_internvl.export.write import Options, Report, export
from lightning_internvl.files import RUN_CONFIG, write_json
from lightning_internvl.freezing import FreezePlan
from lightning_internvl.opened import open_run

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function of a recipe and overrides that writes the run of its last stage, with all weights drawn anew."""

    def make(experiment: str, *overrides: str, name: str = "run") -> Path:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=[f"experiment={experiment}", f"paths.run={tmp_path / name}", *overrides])
        config.paths.sweep = "unused"
        plain = OmegaConf.to_container(config, resolve=True)
        stage = plain["pipeline"][-1]
        settings = stage_settings(plain, stage)
        model, tokenizers = compose_model(settings["parts"], build)
        with torch.no_grad():
            for parameter in model.parameters():  # so that none is 0 or 1, and every path is heard
                parameter.normal_(std=0.08).add_(1.0 if parameter.ndim == 1 else 0.0)
        run = tmp_path / name
        run.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(plain), run / RUN_CONFIG)
        write_json(run / "metrics.json", {stage: {"answers_accuracy": 0.5, "answers_accuracy_chance": 0.25}})
        plan = FreezePlan(settings["module"]["train"], settings["parts"].get("peft"))
        folder = run / "handoff" / stage
        handoff.save(model, folder, stage=stage, step=1, config=settings["parts"], plan=plan, tokenizers=tokenizers)
        return run

    return make


@pytest.fixture
def exported(make_run: MakeRun, tmp_path: Path) -> Callable[..., tuple[Path, Report]]:
    """A function of a recipe and options that exports its run: the folder and the report."""

    def write(experiment: str, *overrides: str, **options: object) -> tuple[Path, Report]:
        run = make_run(experiment, *overrides)
        return tmp_path / "out", export(open_run(run, build), tmp_path / "out", Options(**options))

    return write
