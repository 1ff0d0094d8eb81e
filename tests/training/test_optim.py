"""Parameter groups and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import Optimizer

from lightning_internvl.distributed.gradients import clip, clip_in_step, clips_in_step, gradients_of, total_norm
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, ITM
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.training.optim import adamw, cosine, parameter_groups, sgd


@pytest.fixture
def model(qllama: QLLaMA) -> nn.ModuleDict:
    return nn.ModuleDict({"middleware": qllama, "itc": ITC()})


def groups_of(model: nn.Module, plan: FreezePlan, **options: object) -> dict[str, dict[str, object]]:
    """Each parameter's group, by name."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = [(names[id(p)], g) for g in parameter_groups(model, plan, lr=1.0, weight_decay=0.1, **options) for p in g["params"]]
    assert len({name for name, _ in found}) == len(found), "a parameter stands in two groups"
    return dict(found)


def test_every_parameter_that_ever_trains_stands_in_one_group(model: nn.ModuleDict) -> None:
    plan = FreezePlan(
        [
            {"name": "middleware.*.cross_attn", "from_step": 100},
            "itc",
            {"name": "middleware.query_tokens", "until_step": 5},
        ]
    )
    groups = groups_of(model, plan)
    assert groups.keys() == {n for n, _ in model.named_parameters() if plan.ever_trains(n)}
    assert {
        "middleware.clip_projector2.cross_attn.q_bias",
        "middleware.query_tokens",
        "itc.logit_scale",
    } < groups.keys()
    assert not any("self_attn" in name for name in groups)
    everything = groups_of(model, FreezePlan(["middleware", "itc"]))
    assert everything.keys() == {n for n, _ in model.named_parameters()}


def test_vectors_tables_and_tokens_do_not_decay(model: nn.ModuleDict) -> None:
    groups = groups_of(model, FreezePlan(["*"]))
    parameters = dict(model.named_parameters())
    decaying = {name for name, group in groups.items() if group["weight_decay"]}
    assert not any(parameters[name].ndim == 1 for name in decaying)
    assert not {"middleware.query_tokens", "itc.logit_scale", "middleware.qllama.model.embed_tokens.weight"} & decaying
    assert {"middleware.qllama.lm_head.weight", "middleware.text_projection"} <= decaying
    assert {groups[name]["weight_decay"] for name in decaying} == {0.1}


def test_parts_may_have_rates_of_their_own_and_the_first_match_wins(model: nn.ModuleDict) -> None:
    rates = {"middleware.*.cross_attn": 3.0, "middleware": 2.0}
    groups = groups_of(model, FreezePlan(["*"]), part_lr=rates)
    assert groups["middleware.qllama.model.layers.0.cross_attn.q_proj.weight"]["lr"] == 3.0
    assert groups["middleware.qllama.model.layers.0.self_attn.q_proj.weight"]["lr"] == 2.0
    assert groups["itc.logit_scale"]["lr"] == 1.0
    assert groups["itc.logit_scale"]["name"] == "rest (no decay)"


def test_adamw_holds_the_groups_and_its_settings(model: nn.ModuleDict) -> None:
    optimizer = adamw(
        model,
        FreezePlan(["middleware"]),
        lr=0.5,
        betas=(0.9, 0.95),
        weight_decay=0.2,
        part_lr={"middleware.clip_projector": 0.1},
    )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(model["middleware"].parameters()))
    assert {(g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups} == {
        (0.5, 0.2, (0.9, 0.95)), (0.5, 0.0, (0.9, 0.95)), (0.1, 0.2, (0.9, 0.95)), (0.1, 0.0, (0.9, 0.95))
    }  # fmt: skip


# Two blocks in the tower, four layers in QLLaMA: layer i has 0.9^(L - i), what is below layer 0 has 0.9^(L + 1).
DECAYED = {
    "encoder.embeddings.class_embedding": 0.9**3,
    "encoder.embeddings.patch_embedding.weight": 0.9**3,
    "encoder.embeddings.position_embedding": 0.9**3,
    "encoder.encoder.layers.0.attn.qkv.weight": 0.9**2,
    "encoder.encoder.layers.0.ls1": 0.9**2,
    "encoder.encoder.layers.1.mlp.fc2.bias": 0.9,
    "middleware.query_tokens": 0.5**5,
    "middleware.qllama.model.embed_tokens.weight": 0.5**5,
    "objectives.itc.logit_scale": 0.5**5,
    "middleware.qllama.model.layers.0.cross_attn.q_proj.weight": 0.5**4,
    "middleware.qllama.model.layers.1.self_attn.q_proj.weight": 0.5**3,
    "middleware.qllama.model.layers.2.input_layernorm.weight": 0.5**2,
    "middleware.qllama.model.layers.3.mlp.up_proj.weight": 0.5,
    "middleware.qllama.model.norm.weight": 1.0,
    "middleware.qllama.lm_head.weight": 1.0,
    "middleware.clip_projector.norm1_q.weight": 1.0,
    "middleware.clip_projector2.cross_attn.proj.weight": 1.0,
    "middleware.text_projection": 1.0,
    "objectives.itm.itm_head.weight": 1.0,
}


@pytest.fixture
def vlm(qllama: QLLaMA) -> VLM:
    tower = InternViT(image_size=16, patch_size=4, dim=24, depth=2, heads=3, mlp_dim=32)
    return VLM(tower, qllama, objectives={"itc": ITC(), "itm": ITM(dim=16)})


def test_rates_fall_from_layer_to_layer(vlm: VLM) -> None:
    groups = groups_of(vlm, FreezePlan(["*"]), layer_decay={"encoder": 0.9, "middleware": 0.5})
    assert groups.keys() == {n for n, _ in vlm.named_parameters()}
    for name, scale in DECAYED.items():
        assert groups[name]["lr"] == pytest.approx(scale), name
    assert groups["middleware.query_tokens"]["weight_decay"] == 0.0
    named = {group["name"]: group["lr"] for group in groups.values()}
    assert len(named) == len({id(group) for group in groups.values()}), "two groups have one name"
    assert named["encoder layer 1"] == named["encoder layer 1 (no decay)"] == pytest.approx(0.9)
    assert named["middleware below layer 0 (no decay)"] == pytest.approx(0.5**5)
    assert named["rest"] == 1.0


def test_decay_by_layer_scales_the_rates_of_parts(vlm: VLM) -> None:
    rates = {"encoder.embeddings.patch_embedding": 0.1, "middleware": 2.0}
    groups = groups_of(vlm, FreezePlan(["*"]), part_lr=rates, layer_decay={"middleware": 0.5})
    assert groups["encoder.embeddings.patch_embedding.weight"]["lr"] == pytest.approx(0.1)
    assert groups["encoder.encoder.layers.0.ls1"]["lr"] == 1.0
    assert groups["middleware.qllama.model.layers.3.mlp.up_proj.weight"]["lr"] == pytest.approx(2.0 * 0.5)
    assert groups["middleware.qllama.model.layers.3.mlp.up_proj.weight"]["name"] == "middleware, middleware layer 3"


@pytest.mark.parametrize(
    ("decay", "message"),
    [
        ({"tower": 0.9}, "'tower' is no part with layers here; valid choices: encoder, middleware"),
        ({"objectives": 0.9}, "'objectives' is no part with layers here"),
        ({"encoder": 1.5}, r"layer_decay\.encoder=1\.5 must lie above 0"),
    ],
)
def test_a_decay_that_fits_nothing_is_refused(vlm: VLM, decay: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(vlm, FreezePlan(["*"]), lr=1.0, weight_decay=0.1, layer_decay=decay)


def test_sgd_holds_the_groups_and_its_settings(vlm: VLM) -> None:
    optimizer = sgd(vlm, FreezePlan(["middleware"]), lr=0.5, momentum=0.8, part_lr={"middleware.clip_projector": 0.1})
    assert {(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.5, 0.8, 0.0), (0.1, 0.8, 0.0)}


def rates(steps: int, **schedule: float) -> list[float]:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0}])
    scheduler = cosine(optimizer, **schedule)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warm_up_is_linear_and_cosine_follows() -> None:
    seen = rates(14, total_steps=12, warmup_steps=4, min_ratio=0.1)
    assert seen[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert seen[4] == pytest.approx(2.0)
    assert seen[8] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert seen[6] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert seen[12:] == pytest.approx([0.2, 0.2])


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates(3, total_steps=2) == pytest.approx([2.0, 1.0, 0.0])


@pytest.mark.parametrize("make", [adamw, sgd])
def test_gradients_can_be_clipped_in_mixed_precision(model: nn.ModuleDict, make: Callable[..., Optimizer]) -> None:
    optimizer = make(model, FreezePlan(["middleware"]), lr=1.0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 1.0)
    assert torch.nn.utils.get_total_norm([p.grad for p in parameters]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_a_step_that_clips_is_that_of_clipped_gradients(limit: float) -> None:
    ends = []
    for inside in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(5, 4)).square().sum().backward()
            grads = gradients_of(optimizer)
            assert not clips_in_step(optimizer, grads)  # on a CPU
            if inside:
                clip_in_step(optimizer, limit, total_norm(grads))
            else:
                clip(grads, limit, total_norm(grads))
            optimizer.step()
        ends.append([*net.parameters(), *gradients_of(optimizer)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
