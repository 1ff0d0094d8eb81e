"""Similarities are float32 products, also where the rest trains in bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.objectives.itc import ITC
from lightning_internvl.objectives.query_itc import QueryITC
from lightning_internvl.objectives.siglip import SigLIP


@pytest.mark.parametrize("objective", [ITC(init_scale=100.0), SigLIP(init_scale=100.0), QueryITC()])
def test_logits_under_autocast_are_those_of_float32(objective: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 64, generator=generator), dim=-1) for _ in range(2))
    exact = objective.logits(image, text)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.logits(image, text)
    assert found.dtype == torch.float32
    assert found.equal(exact)
    low = objective.logits(image.bfloat16(), text.bfloat16())
    assert low.dtype == torch.float32
    assert (low - exact).abs().max() < 1.0  # of embeddings that are bf16 themselves


def test_gradients_reach_both_sides_under_autocast() -> None:
    rows: list[Tensor] = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        ITC().train()(*rows).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in rows)
