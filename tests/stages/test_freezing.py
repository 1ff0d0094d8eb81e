"""Which parameters train, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_internvl.stages.freezing import FreezePlan, matches


class Toy(nn.Module):
    """Two parts with a scale each, the shape of a composed model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 3))
        self.middleware = nn.ModuleDict({"queries": nn.Linear(3, 2, bias=False), "lm": nn.Linear(2, 5)})
        self.decoder = None


def trained(plan: FreezePlan, model: nn.Module, step: int) -> set[str]:
    plan.apply(model, step)
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("encoder.0.weight", "encoder", True),
        ("encoder.0.weight", "encoder.0", True),
        ("encoder.0.weight", "encoder.0.weight", True),
        ("encoder.0.weight", "*.weight", True),
        ("encoder.0.weight", "encoder.*.weight", True),
        ("encoder.0.weight", "enc", False),
        ("encoder.0.weight", "0.weight", False),
        ("encoder2.0.weight", "encoder", False),
        ("middleware.l.cross_attn.q.weight", "middleware.*.cross_attn", True),
    ],
)
def test_names_match_whole_parts_modules_parameters_and_patterns(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_what_no_rule_names_is_frozen() -> None:
    assert trained(FreezePlan(["middleware.queries"]), Toy(), 0) == {"middleware.queries.weight"}
    assert trained(FreezePlan([]), Toy(), 0) == set()


def test_the_first_rule_that_matches_speaks() -> None:
    plan = FreezePlan([{"name": "encoder.0", "from_step": 10}, "encoder"])
    assert trained(plan, Toy(), 0) == {"encoder.2.weight", "encoder.2.bias"}
    assert trained(plan, Toy(), 10) == {"encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"}
    reverse = FreezePlan(["encoder", {"name": "encoder.0", "from_step": 10}])
    assert "encoder.0.weight" in trained(reverse, Toy(), 0)


@pytest.mark.parametrize(("step", "trains"), [(0, False), (4, False), (5, True), (8, True), (9, False), (100, False)])
def test_from_is_inclusive_and_until_exclusive(step: int, trains: bool) -> None:
    plan = FreezePlan([{"name": "encoder", "from_step": 5, "until_step": 9}])
    model = Toy()
    assert ("encoder.0.weight" in trained(plan, model, step)) is trains
    assert plan.trains("encoder.0.weight", step) is trains
    assert plan.ever_trains("encoder.0.weight")
    assert not plan.ever_trains("middleware.lm.weight")


def test_the_state_depends_on_the_step_alone() -> None:
    plan = FreezePlan([{"name": "encoder", "until_step": 3}, {"name": "middleware", "from_step": 2}])
    walked = Toy()
    states = [trained(plan, walked, step) for step in range(5)]
    assert states == [trained(plan, Toy(), step) for step in range(5)]
    assert len({frozenset(state) for state in states}) == 3
    assert plan.changes() == [0, 2, 3]


def test_a_part_in_which_nothing_trains_is_in_evaluation_mode_and_forgets_gradients() -> None:
    model = Toy().train()
    plan = FreezePlan([{"name": "encoder.0", "until_step": 1}, "middleware.queries"])
    plan.apply(model, 0)
    assert model.encoder.training
    assert model.encoder[1].training
    model.encoder[0].weight.grad = torch.ones(3, 2)
    plan.apply(model, 1)
    assert not model.encoder.training
    assert not model.encoder[1].training
    assert model.encoder[0].weight.grad is None
    assert model.middleware.training
    plan.apply(model, 0)
    assert model.encoder[1].training


def test_a_rule_that_matches_nothing_is_an_error_that_shows_the_names() -> None:
    with pytest.raises(
        ValueError, match=r"'encodr' matches no parameter; names here begin with encoder\.0, encoder\.2, middleware\.lm"
    ):
        FreezePlan(["middleware", "encodr"]).check(Toy())
    FreezePlan(["middleware", "encoder"]).check(Toy())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "encoder", "from": 3}, "valid keys are name, from_step, until_step"),
        ({"from_step": 3}, "name is required"),
        ({"name": "encoder", "from_step": 3, "until_step": 3}, "never trains"),
        ({"name": "encoder", "from_step": -1}, "never trains"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreezePlan([rule])


def test_the_table_counts_and_explains() -> None:
    plan = FreezePlan([{"name": "encoder.2.bias", "from_step": 4}, {"name": "middleware.lm", "until_step": 9}])
    rows = {row["group"]: row for row in plan.table(Toy(), 0)}
    assert {g: (r["trained"], r["frozen"]) for g, r in rows.items()} == {
        "encoder.0": (0, 9), "encoder.2": (0, 12), "middleware.queries": (0, 6), "middleware.lm": (15, 0)
    }  # fmt: skip
    assert rows["encoder.0"]["why"] == "not listed under train"
    assert rows["encoder.2"]["why"] == "not listed under train; encoder.2.bias from step 4"
    assert rows["middleware.lm"]["why"] == "middleware.lm until step 9"
    later = {row["group"]: row["trained"] for row in plan.table(Toy(), 9)}
    assert later == {"encoder.0": 0, "encoder.2": 3, "middleware.queries": 0, "middleware.lm": 0}
