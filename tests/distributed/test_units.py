"""What is divided among processes as one unit: never trained and frozen weights together, and nothing that must stay whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import ROOT, TINY
from torch import nn

import lightning_internvl.cli  # noqa: F401  # for its resolvers
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.distributed.fsdp2 import check_shapes, kind_of, units_of
from lightning_internvl.model.compose import compose_model
from lightning_internvl.stages import Stage
from lightning_internvl.training.assembly import build_stage

PUBLISHED = (
    "stages.generative.module.train=[middleware.query_tokens,middleware.qllama.model.layers.*.cross_attn,"
    "{name: middleware.clip_projector2, from_step: 2},objectives]"
)
ADAPTERS = tuple(f"peft/part@peft.{part}=lora" for part in ("encoder", "middleware"))


def stage_of(name: str, *settings: str) -> Stage:
    """A stage on the meta device."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", [*TINY, *settings]), resolve=True)
    own = stage_settings(config, name)
    with torch.device("meta"):
        return build_stage(own, compose_model(own.parts.config, build)[0], Path(), build)


@pytest.mark.parametrize(
    ("name", "settings", "mixed"),
    [
        ("contrastive", (), True),  # cross-attention waits for the next stage
        ("generative", (PUBLISHED,), True),
        ("supervised", (), False),
        ("supervised", ("peft=lora", *ADAPTERS), True),
    ],
    ids=["contrastive", "published", "supervised", "adapters"],
)
def test_no_unit_holds_weights_that_train_at_different_times(name: str, settings: tuple[str, ...], mixed: bool) -> None:
    stage = stage_of(name, *settings)
    kinds = {parameter: kind_of(stage, n) for n, parameter in stage.model.named_parameters()}
    owned: set[nn.Parameter] = set()
    units = [unit for part in stage.model.children() for unit in units_of(part, kinds)]
    blocks = [block for part in (stage.model.encoder, stage.model.middleware, stage.model.decoder) if part is not None
              for block in part.sharding_units()]  # fmt: skip
    assert {id(block) for block in blocks} <= {id(unit) for unit in units}
    assert (len(units) > len(blocks)) == mixed
    for unit in units:
        own = [parameter for parameter in unit.parameters() if parameter not in owned]
        assert len({kinds[parameter] for parameter in own}) == 1
        owned.update(own)
    assert {p for block in blocks for p in block.parameters()} == owned


def test_a_parameter_without_a_dimension_is_named() -> None:
    stage = stage_of("contrastive")
    stage.model.objectives["itc"].logit_scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match=r"shape \(1,\).*objectives.itc.logit_scale"):
        check_shapes(stage)
