"""Image-text matching: does this caption belong to this picture? (BLIP-2; InternVL stage 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ITM(nn.Module):
    """A linear head on every query that has seen picture and text together; the mean over queries decides."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.itm_head = nn.Linear(dim, 2)

    def logits(self, queries_BQM: Tensor) -> Tensor:
        """(B, Q, M) -> (B, 2), column 1 for a match."""
        return self.itm_head(queries_BQM).mean(dim=1)

    def forward(self, queries_BQM: Tensor, labels_B: Tensor) -> Tensor:
        """Mean cross-entropy; labels are 1 for a match and 0 otherwise."""
        return F.cross_entropy(self.logits(queries_BQM).float(), labels_B)


@torch.no_grad()
def mined_negatives(similarity_BB: Tensor) -> Tensor:
    """A wrong text for every image, drawn in proportion to the softmax of the scaled similarities (BLIP-2 section 3.1): (B,)."""
    return similarity_BB.float().softmax(dim=1).clamp(min=1e-6).fill_diagonal_(0).multinomial(1).squeeze(1)


def random_negatives(batch: int, device: torch.device) -> Tensor:
    """A wrong text for every image, drawn evenly: (B,)."""
    return (torch.arange(batch, device=device) + torch.randint(1, batch, (batch,), device=device)) % batch
