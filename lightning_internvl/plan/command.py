"""Every stage of a pipeline on the meta device, measured, told; nothing is trained."""

from __future__ import annotations

from lightning_internvl.choices import Config
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.console import console
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.model.compose import Build
from lightning_internvl.plan.stage_plan import StagePlan, stage_plans


def run_plan(config: Config, build: Build) -> list[StagePlan]:
    """Print what each stage of the pipeline needs.

    Raises:
        ValueError: naming the stage whose settings do not fit together.
    """
    from lightning_internvl.plan.cost import Rate, cost_of
    from lightning_internvl.plan.tables import NOTES, stage_report

    rate = Rate.of(config)
    run = RunSettings.of(config)
    # what all others keep is the same
    choose_backend("math" if run.attention == "math" else "sdpa")
    plans = []
    for plan in stage_plans(run.trained, build):
        for part in stage_report(plan):
            console.print(part)
        console.print(cost_of(plan, rate))
        plans.append(plan)
    console.print(NOTES)
    return plans
