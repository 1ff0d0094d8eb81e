"""Next-token prediction over labelled tokens only: captions (ITG) and answers (supervised stage)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.distributed import global_mean

IGNORED = -100


class NextToken(nn.Module):
    """Cross-entropy of the next token: the sum over labelled tokens divided by their number on all ranks.

    Logits are computed where a label stands and nowhere else, so a large vocabulary costs memory for answers only.

    Args:
        label_smoothing: share of the target spread over the vocabulary.
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"{label_smoothing=} must lie from 0 on and below 1")
        self.label_smoothing = label_smoothing

    def forward(self, hidden_BLH: Tensor, labels_BL: Tensor, head: Callable[[Tensor], Tensor], *, shifts: bool = True) -> Tensor:
        """The token at position t is judged by the state at t - 1.

        Args:
            labels_BL: ids, -100 where nothing is to be learnt.
            head: states (T, H) to logits (T, V).
            shifts: False where the state at t judges the token at t, as behind the decoder of an encoder-decoder.
        """
        if shifts:
            hidden_BLH, labels_BL = hidden_BLH[:, :-1], labels_BL[:, 1:]
        labelled = labels_BL != IGNORED
        states, targets = _chosen(hidden_BLH, labelled), _chosen(labels_BL, labelled)
        logits = head(states).float()
        total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing)
        return global_mean(total, labelled.sum())


def _chosen(x_BL: Tensor, labelled_BL: Tensor) -> Tensor:
    """Entries where a label stands; on the meta device, which holds no values, all of them, the most that it can be."""
    return x_BL.flatten(0, 1) if x_BL.is_meta else x_BL[labelled_BL]
