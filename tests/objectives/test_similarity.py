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


@pytest.mark.parametrize(
    "objective",
    [
        ITC(init_scale=100.0),
        ITC(init_scale=100.0, chunk=2),
        ITC(label_smoothing=0.1),
        QueryITC(),
        SigLIP(),
        SigLIP(init_scale=100.0, chunk=3),
    ],
)
def test_a_pair_that_comes_twice_is_not_its_own_wrong_answer(objective: torch.nn.Module) -> None:
    image, text = F.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    shown = image[:, None].expand(-1, 3, -1) if isinstance(objective, QueryITC) else image
    once = objective(shown, text, pair_ids_B=torch.arange(4))
    torch.testing.assert_close(once, objective(shown, text))
    twice = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    again = objective(shown[twice], text[twice], pair_ids_B=twice)
    # Each row is compared with itself and, twice, with the three others: more than before, less than with itself as another.
    assert once < again < objective(shown[twice], text[twice])


@pytest.mark.parametrize(
    "objective", [ITC(init_scale=100.0), QueryITC(init_temp=0.01), SigLIP(init_scale=100.0, init_bias=-50.0)]
)
def test_perfect_embeddings_of_pairs_that_come_again_have_no_loss(objective: torch.nn.Module) -> None:
    pairs = torch.tensor([0, 1, 2, 0, 1])
    rows = torch.eye(8)[pairs]
    shown = rows[:, None] if isinstance(objective, QueryITC) else rows
    assert objective(shown, rows, pair_ids_B=pairs) < 1e-6
    assert objective(shown, rows) > 0.3
