"""Which wrong captions the matching loss of the generative stage reads, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, ITM, NextToken
from lightning_internvl.stages import GenerativeStage, generative


def stage_of(encoder: InternViT, qllama: QLLaMA, **options: object) -> GenerativeStage:
    objectives = {"itc": ITC(), "itm": ITM(dim=16), "itg": NextToken()}
    return GenerativeStage(
        VLM(encoder, qllama, objectives=objectives), name="generative", run_dir=Path(), parts={}, train=["middleware"],
        optimizer=torch.optim.SGD, scheduler=torch.optim.lr_scheduler.LambdaLR, max_steps=4, **options,
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    ids, ones = torch.randint(0, 31, (3, 6, 5)), torch.ones(6, 5, dtype=torch.long)
    named = {f"{task}_ids": ids[i] for i, task in enumerate(("itc", "itm", "itg"))}
    return named | {f"{task}_mask": ones for task in ("itc", "itm", "itg")} | {
        "itg_labels": ids[2], "pixel_values": torch.randn(6, 3, 16, 16),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "step", "mined"),
    [
        ({"negatives": "mined"}, 0, True),
        ({"negatives": "mined", "mined_from_step": 2}, 1, False),
        ({"negatives": "mined", "mined_from_step": 2}, 2, True),
        ({"negatives": "random"}, 3, False),
    ],
)
def test_the_curriculum_of_negatives(
    encoder: InternViT, qllama: QLLaMA, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], step: int, mined: bool
) -> None:
    drawn: list[str] = []
    for name in ("mined_negatives", "random_negatives"):
        original = getattr(generative, name)
        monkeypatch.setattr(generative, name, lambda *a, name=name, original=original: (drawn.append(name), original(*a))[1])
    monkeypatch.setattr(GenerativeStage, "global_step", step)
    losses = stage_of(encoder, qllama, **options).losses(batch())
    assert drawn == ["mined_negatives" if mined else "random_negatives"]
    assert set(losses) == {"itc", "itm", "itg"}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_step_before_the_start_is_refused(encoder: InternViT, qllama: QLLaMA) -> None:
    with pytest.raises(ValueError, match="mined_from_step=-1 must be a step"):
        stage_of(encoder, qllama, mined_from_step=-1)
