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
    """

    def forward(self, hidden_BLH: Tensor, labels_BL: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """The token at position t is judged by the state at t - 1.

        Args:
            labels_BL: ids, -100 where nothing is to be learnt.
            head: states (T, H) to logits (T, V).
        """
        targets = labels_BL[:, 1:]
        labelled = targets != IGNORED
        logits = head(hidden_BLH[:, :-1][labelled]).float()
        return global_mean(F.cross_entropy(logits, targets[labelled], reduction="sum"), labelled.sum())
