"""Parameter groups and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_internvl.freezing import FreezePlan
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.objectives import ITC
from lightning_internvl.optim import adamw, cosine, parameter_groups


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
