"""Naming a picture among fixed classes, for probes on a frozen tower."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Classification(nn.Module):
    """Cross-entropy over classes.

    Args:
        label_smoothing: share of the target spread over all classes.
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"{label_smoothing=} must lie from 0 on and below 1")
        self.label_smoothing = label_smoothing

    def forward(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Mean over the batch of (B, C) scores and the numbers of the true classes; batches of all
        ranks are equally large."""
        return F.cross_entropy(logits_BC.float(), labels_B, label_smoothing=self.label_smoothing)
