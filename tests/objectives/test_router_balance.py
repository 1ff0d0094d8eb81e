"""The loss that spreads tokens over experts, beside the function of transformers, and in a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.objectives.router_balance import router_balance
from lightning_internvl.plan.stage_plan import stage_plan
from lightning_internvl.training.assembly import Assembly, assemble

EXPERTS = ("experiment=internvl_3_5_toy", "decoder=qwen3_moe_toy")


@pytest.mark.parametrize(("experts", "chosen"), [(4, 1), (4, 2), (7, 3)])
def test_it_is_the_loss_of_transformers(experts: int, chosen: int) -> None:
    logits = [torch.randn(10, experts, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    theirs = load_balancing_loss_func(tuple(logits), experts, chosen, mask)
    wanted = torch.autograd.grad(theirs, logits)
    ours = router_balance(logits, mask, chosen)
    torch.testing.assert_close(ours, theirs)
    for found, expected in zip(torch.autograd.grad(ours, logits), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_equal_use_is_the_least() -> None:
    even = torch.eye(4).repeat(5, 1) * 9
    assert router_balance([even], torch.ones(2, 10), 1).item() == pytest.approx(1, abs=1e-3)
    assert router_balance([even[:1].repeat(20, 1)], torch.ones(2, 10), 1).item() > 3.9


def assembled(folder: Path, *overrides: str) -> Assembly:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=[*EXPERTS, f"paths.run={folder}", *overrides])
    return assemble(stage_settings(OmegaConf.to_container(composed, resolve=True), "sft"), folder, build)


def batch_of(parts: Assembly) -> dict[str, Any]:
    return parts.data.collate([parts.data.dataset[place] for place in range(3)])


@pytest.mark.parametrize("packed", [False, True])
def test_a_stage_adds_it_and_its_gradient_reaches_the_routers(tmp_path: Path, packed: bool) -> None:
    parts = assembled(tmp_path, "stages.sft.module.router_balance=0.5", *(["data.packing=true"] if packed else []))
    stage, batch = parts.stage, batch_of(parts)
    if packed:
        prepared = [parts.data.collate.prepare(parts.data.dataset[place]) for place in range(3)]
        batch = parts.data.collate.pack([prepared])
    losses = stage.losses(batch)
    assert 2 <= losses["router"].item() < 4  # of 4 experts, 2 for a token
    assert stage.weighted_sum(losses).item() == pytest.approx((losses["next_token"] + 0.5 * losses["router"]).item())
    losses["router"].backward()
    routers = stage.model.decoder.routers()
    assert len(routers) == stage.model.decoder.lm.config.num_hidden_layers
    assert all(router.weight.grad.abs().sum() > 0 for router in routers)
    assert not any(router._forward_hooks for router in routers)
    real = int(batch["attention_mask"].sum())
    assert stage.counts(batch)["router"] == real


def test_blocks_that_are_computed_again_give_the_same(tmp_path: Path) -> None:
    found = []
    for number, recompute in enumerate(("null", "full")):
        words = ("stages.sft.module.router_balance=0.5", f"activation_checkpointing={recompute}", "trainer.precision=32-true")
        parts = assembled(tmp_path / str(number), *words)
        torch.manual_seed(0)
        losses = parts.stage.losses(batch_of(parts))
        parts.stage.weighted_sum(losses).backward()
        found.append([losses["router"].detach(), *(x.weight.grad for x in parts.stage.model.decoder.routers())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_it_is_planned() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = ["stages.sft.module.router_balance=0.5", "decoder.config.num_hidden_layers=4", "paths.root=."]
        composed = compose("config", overrides=[*EXPERTS, *words])
    plan = stage_plan(stage_settings(OmegaConf.to_container(composed, resolve=True), "sft"), build)
    assert plan.memory().total > 0


def test_it_needs_experts(tmp_path: Path) -> None:
    words = "decoder=qwen3_toy", "stages.sft.module.router_balance=0.1"
    with pytest.raises(ValueError, match=r"stages\.sft\.module\.router_balance=0\.1 needs a decoder with experts"):
        assembled(tmp_path, *words)
    with pytest.raises(ValueError, match=r"router_balance=-1 must be a number"):
        assembled(tmp_path, "stages.sft.module.router_balance=-1")
