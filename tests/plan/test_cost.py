"""Hours and money of a stage, by a stated rate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan import SMALL, composed

from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.plan.cost import UNKNOWN, Rate, cost_of, step_flops
from lightning_internvl.plan.stage_plan import StagePlan, stage_plan

STAGE = "contrastive"


@pytest.fixture(scope="module")
def plan() -> StagePlan:
    config = composed(*SMALL, "device_memory=80", "trainer.devices=4")
    return stage_plan(replace(stage_settings(config, STAGE), max_steps=1800), build)


def test_hours_and_money_follow_from_a_rate(plan: StagePlan) -> None:
    a_second = 2 * step_flops(plan) / 1e12  # TFLOP/s at which a step takes half of it
    rate = Rate.of({"device_tflops": a_second, "device_utilisation": 0.25, "price_per_hour": 3.0})
    told = cost_of(plan, rate)
    assert told.startswith("1,800 steps of 2 s: 1 hours, 4 of one device, for 12.00 (an estimate: 0.25")
    assert "for" not in cost_of(plan, replace(rate, price=None)).partition("(")[0]


def test_what_is_computed_again_counts(plan: StagePlan) -> None:
    forward = sum(curve(plan.batch) for curve in plan.measured.forward.values())
    again = {"encoder": "full", "middleware": "full"}
    full = replace(plan, settings=replace(plan.settings, activation_checkpointing=again))
    cached = replace(plan, measured=replace(plan.measured, cached=plan.batch // 2))
    some = replace(plan.settings.trainer, accumulate_grad_batches=3)
    thrice = replace(plan, settings=replace(plan.settings, trainer=some))
    parts = sum(plan.measured.forward[name](plan.batch) for name in again)
    assert step_flops(full) - step_flops(plan) == pytest.approx(parts)
    assert step_flops(cached) - step_flops(plan) == pytest.approx(forward / 2)
    assert step_flops(thrice) == pytest.approx(3 * step_flops(plan))


def test_a_length_in_passes_is_told_by_the_thousand(plan: StagePlan) -> None:
    endless = replace(plan, settings=replace(plan.settings, max_steps=0))
    assert cost_of(endless, Rate(None, 0.4, None)).startswith("1,000 steps of")


def test_known_devices_have_a_peak_and_cpus_none(plan: StagePlan) -> None:
    def peak(place: str) -> float | None:
        flops = Rate(None, 0.5, None).flops(replace(plan, setup=replace(plan.setup, place=place)))
        return flops and flops / 0.5e12

    places = ("a device", "of an NVIDIA A100-SXM4-80GB", "of this machine's RAM")
    assert list(map(peak, places)) == [989, 312, None]
    laptop = replace(plan, setup=replace(plan.setup, place=places[-1]))
    assert cost_of(laptop, Rate(None, 0.5, 2.0)) == UNKNOWN
