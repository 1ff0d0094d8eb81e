"""Refusing numbers that are none, where a score would be made of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


def check_finite(found: Tensor, what: str) -> Tensor:
    """The same tensor.

    Args:
        what: its rows, in words.

    Raises:
        ValueError: if a row holds NaN or an infinity. Comparisons with NaN are all false, so that a
            broken model would get a score as any other.
    """
    broken = ~found.isfinite()
    if bool(broken.any()):
        rows = int(broken.flatten(1).any(dim=1).sum()) if found.ndim > 1 else int(broken.sum())
        raise ValueError(
            f"{rows} of {len(found)} {what} are NaN or infinite: the weights are damaged, or their numbers too large "
            "for this precision (trainer.precision=32-true tells which)"
        )
    return found


class FiniteLogits(LogitsProcessor):
    """Raises ValueError where a model gives NaN for the next token: the answer would be the first word
    of the vocabulary again and again."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) as it is; minus infinity is a token that other rules exclude."""
        check_finite(torch.where(scores == -torch.inf, 0.0, scores), "rows of next-token logits")
        return scores
