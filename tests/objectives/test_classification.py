"""Naming a picture among fixed classes."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.objectives import Classification


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_definition(smoothing: float) -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([2, 0, 1, 1])
    logs = logits.log_softmax(dim=-1)
    expected = -((1 - smoothing) * logs[torch.arange(4), labels] + smoothing * logs.mean(dim=1)).mean()
    torch.testing.assert_close(Classification(label_smoothing=smoothing)(logits, labels), expected)


def test_scores_of_low_precision_are_judged_in_float32() -> None:
    assert Classification()(torch.randn(4, 3).bfloat16(), torch.tensor([2, 0, 1, 1])).dtype == torch.float32


def test_a_smoothing_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0 must lie"):
        Classification(label_smoothing=1.0)
