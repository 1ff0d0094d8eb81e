"""Image-text matching: does this caption belong to this picture? (BLIP-2; InternVL stage 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.distributed.collectives import global_mean


class ITM(nn.Module):
    """A linear head on every query that has seen picture and text; their mean decides."""

    draws_wrong_partners = True  # for a pair from its batch (see `lightning_internvl.config.pair_checks`)

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.itm_head = nn.Linear(dim, 2)

    def logits(self, queries_BQM: Tensor) -> Tensor:
        """(B, Q, M) -> (B, 2), column 1 for a match."""
        return self.itm_head(queries_BQM).mean(dim=1)

    def forward(self, queries_BQM: Tensor, labels_B: Tensor) -> Tensor:
        """Mean cross-entropy over all ranks; labels are 1 for a match, 0 for none, and -100 for
        rows that are not judged."""
        logits = self.logits(queries_BQM).float()
        total = F.cross_entropy(logits, labels_B, ignore_index=IGNORE_INDEX, reduction="sum")
        return global_mean(total, (labels_B != IGNORE_INDEX).sum())


def other_pictures(image_ids_B: Tensor) -> Tensor:
    """Which texts are captions of another picture than each row's, and so may stand as its wrong
    text: bool (B, B)."""
    return image_ids_B[:, None] != image_ids_B


@torch.no_grad()
def mined_negatives(similarity_BB: Tensor, others_BB: Tensor | None = None) -> Tensor:
    """A wrong text for every image, drawn in proportion to the softmax of the scaled similarities
    (BLIP-2 section 3.1): (B,).

    Args:
        others_BB: texts that may be drawn (see `other_pictures`); None: all but the own. A row
            without any gets some other row's.
    """
    weights = similarity_BB.float().softmax(dim=1).clamp(min=1e-6).fill_diagonal_(0)
    return _drawn(_only(weights, others_BB))


@torch.no_grad()
def random_negatives(batch: int, device: torch.device, others_BB: Tensor | None = None) -> Tensor:
    """A wrong text for every image, drawn evenly: (B,). `others_BB` as in `mined_negatives`."""
    steps = torch.randint(1, batch, (batch,), device=device)
    drawn = (torch.arange(batch, device=device) + steps) % batch
    if others_BB is None:
        return drawn
    # What fell on the same picture is drawn once more, evenly among the others; the rest is even
    # already.
    again = _drawn(_only(torch.ones(batch, batch, device=device).fill_diagonal_(0), others_BB))
    return torch.where(others_BB.gather(1, drawn[:, None]).squeeze(1), drawn, again)


def _drawn(weights_BB: Tensor) -> Tensor:
    """One place of each row in proportion to its weights, (B,): what `multinomial` draws, whose
    checks wait for the device."""
    return (weights_BB / torch.empty_like(weights_BB).exponential_()).argmax(dim=1)


def _only(weights_BB: Tensor, others_BB: Tensor | None) -> Tensor:
    """The weights of what may be drawn; a row in which nothing may keeps all of its own, because it
    cannot be left empty."""
    if others_BB is None:
        return weights_BB
    return torch.where(others_BB.any(dim=1, keepdim=True), weights_BB * others_BB, weights_BB)
