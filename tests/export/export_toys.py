"""Untrained models of the toy recipes, shared by the tests of this folder."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from lightning_internvl.checkpoints import handoff
from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.files import RUN_CONFIG, write_json
from lightning_internvl.model.compose import compose_model
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.stages.roles import model_roles


def composed(experiment: str, *overrides: str) -> dict[str, Any]:
    """The configuration of a recipe as plain containers."""
    return copy.deepcopy(_composed(experiment, *overrides))


@cache
def _composed(experiment: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={experiment}", "paths.run=unused", *overrides])
    config.paths.sweep = "unused"
    return OmegaConf.to_container(config, resolve=True)


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Weights of which none is 0 or 1, so that every path is heard."""
    for parameter in model.parameters():
        parameter.normal_(std=0.08).add_(1.0 if parameter.ndim == 1 else 0.0)


def write_run(run: Path, experiment: str, *overrides: str) -> Path:
    """The finished run of a recipe's last stage, with all weights drawn anew."""
    plain = composed(experiment, *overrides)
    stage = plain["pipeline"][-1]
    settings = stage_settings(plain, stage)
    model, tokenizers = compose_model(settings.parts.config, build)
    draw(model)
    run.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(plain), run / RUN_CONFIG)
    write_json(run / "metrics.json", {stage: {"answers_accuracy": 0.5, "answers_accuracy_chance": 0.25}})
    plan = FreezePlan(settings.module["train"], settings.parts.peft, model_roles(model))
    folder = run / "handoff" / stage
    handoff.save(model, folder, stage=stage, step=1, config=settings.parts.config, plan=plan, tokenizers=tokenizers)
    return run
