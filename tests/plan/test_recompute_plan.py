"""The plan of a stage whose blocks are computed again."""

from __future__ import annotations

import torch
from test_plan import SMALL, composed, kept_bytes, real_stage

from lightning_internvl.choices import by_part
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.plan.measure import SAMPLES
from lightning_internvl.plan.meter import ACTIVATIONS
from lightning_internvl.plan.stage_plan import StagePlan, stage_plan
from lightning_internvl.training.activation_checkpointing import recompute_blocks

STAGE = "contrastive"


def planned(kind: str | None) -> StagePlan:
    return stage_plan(stage_settings(composed(*SMALL, f"activation_checkpointing={kind or 'null'}"), STAGE), build)


def activations(plan: StagePlan) -> float:
    return sum(curve(SAMPLES[0]) for curve in plan.measured.kept[ACTIVATIONS].values())


def test_blocks_that_are_computed_again_keep_less() -> None:
    plain, off, selective, full = map(planned, (None, "false", "selective", "full"))
    assert activations(off) == activations(plain)
    assert activations(full) < activations(selective) < activations(plain)
    assert plain.measured.training == full.measured.training  # the work of the model; what is done twice is not counted


def test_what_is_kept_is_what_a_real_step_keeps_and_one_block() -> None:
    torch.manual_seed(0)
    stage, batch = real_stage(composed(*SMALL), STAGE)
    one_block = kept_bytes(stage, batch, autocast=False)
    recompute_blocks(stage.model, by_part("full"))
    real = kept_bytes(stage, batch, autocast=False)
    assert real < activations(planned("full")) < real + one_block / 2
