"""What a plan advises where a stage does not fit: words of the command line that, given, fit."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from test_plan import SMALL, composed

from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.targets import build
from lightning_internvl.plan.advice import SAME, Advice, advice
from lightning_internvl.plan.search import ROOM
from lightning_internvl.plan.stage_plan import StagePlan, stage_plan
from lightning_internvl.plan.tables import in_lines


def planned(stage: str, words: dict[str, str]) -> StagePlan:
    given = [f"{setting}={value}" for setting, value in words.items()]
    (own,) = RunSettings.of(composed(*SMALL, f"pipeline=[{stage}]", *given)).trained
    return stage_plan(own, build)


def advised(stage: str, share: float, words: dict[str, str]) -> tuple[StagePlan, list[Advice]]:
    """The plan of a stage on devices of a share of what it needs, and what it is told."""
    plan = planned(stage, words)
    small = replace(plan.setup, capacity=share * plan.memory().total)
    plan = replace(plan, setup=small)
    return plan, list(advice(plan))


def batch_of(stage: str, devices: int = 1) -> dict[str, str]:
    return {f"stages.{stage}.batch_size": "64", "trainer.devices": str(devices)}


def samples(plan: StagePlan) -> int:
    return plan.batch * plan.accumulate * plan.setup.devices


@pytest.mark.parametrize(
    ("stage", "share", "devices"),
    [
        ("contrastive", 0.5, 4),
        ("generative", 0.7, 1),
        ("supervised", 0.4, 1),
        ("supervised", 0.3, 4),
    ],
)
def test_the_words_fit_with_the_same_batch(stage: str, share: float, devices: int) -> None:
    words = batch_of(stage, devices)
    plan, told = advised(stage, share, words)
    assert not plan.fits(plan.memory())
    assert [one.price[: len(SAME)] for one in told] == [SAME]
    added = dict(word.split("=", 1) for word in shlex.split(told[0].words))
    changed = planned(stage, words | added)
    assert changed.memory().total <= ROOM * plan.setup.capacity
    assert changed.memory().total == pytest.approx(told[0].memory.total, rel=0.03)
    assert samples(changed) == samples(plan)


def test_a_contrast_is_never_told_to_accumulate() -> None:
    plan, light = advised("contrastive", 0.6, batch_of("contrastive", 8))
    tight = replace(plan.setup, capacity=0.02 * plan.setup.capacity)
    told = [*light, *advice(replace(plan, setup=tight))]
    assert len(told) > 1
    assert not any("accumulate" in one.words for one in told)
    assert any("cached_chunk=" in one.words for one in told)


def test_in_batch_losses_compare_fewer_pairs_only_where_nothing_else_fits() -> None:
    plan, (told, *_) = advised("generative", 0.7, batch_of("generative"))
    assert told.price.startswith(SAME)
    least = replace(plan.setup, capacity=0.8 * told.memory.total / ROOM)
    *_, told = advice(replace(plan, setup=least))
    assert "fewer pairs are compared at once" in told.price
    assert "accumulate_grad_batches=" in told.words


def test_a_stage_that_cannot_be_made_to_fit_is_told_what_needs_less() -> None:
    plan, told = advised("contrastive", 0.0001, {})
    now = plan.memory().total
    assert not any(plan.fits(one.memory) for one in told)
    assert all(one.memory.total < now for one in told)
    assert any("module.train without encoder" in one.words for one in told)


def test_long_words_stand_on_lines_that_a_shell_joins() -> None:
    words = " ".join(f"stages.supervised.word_{i}={i}" for i in range(9))
    lines = in_lines(words).splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) < 116
    assert shlex.split("".join(line.removesuffix("\\") for line in lines)) == words.split()


@pytest.mark.parametrize(("objective", "alone"), [("mpo", True), ("simpo", True), ("kto", False)])
def test_pairs_of_answers_are_taken_in_micro_batches_where_each_is_judged_alone(objective: str, alone: bool) -> None:
    _, found = advised("preference", 0.6, {"objective": objective, **batch_of("preference")})
    assert any("accumulate_grad_batches" in one.words and one.price.startswith(SAME) for one in found) == alone
