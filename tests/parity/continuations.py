"""Prompts and answers that were tokenised apart, joined as MiniGPT-4 does (official `minigpt_base.py`).

Letters: B rows, P longest prompt, A longest answer, L = 1 + P + A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX


class Rows(NamedTuple):
    """What a decoder reads and learns, all (B, L)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def joined(
    prompts: Sequence[Sequence[int]], answers_BA: Tensor, mask_BA: Tensor, labels_BA: Tensor, *, bos: int, pad: int
) -> Rows:
    """One row each: `bos`, a prompt, its answer, and `pad` up to the longest prompt and the longest answer together.

    Args:
        prompts: ids, with one placeholder for each visual token.
        answers_BA, mask_BA, labels_BA: padded on the right; of a conversation, all that follows the first question.
    """
    longest, width = max(map(len, prompts)), answers_BA.shape[1]
    ids = torch.full((len(prompts), 1 + longest + width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    ids[:, 0], mask[:, 0] = bos, 1
    for row, prompt in enumerate(prompts):
        start = 1 + len(prompt)
        ids[row, 1:start], mask[row, 1:start] = torch.tensor(prompt, dtype=ids.dtype), 1
        for whole, part in ((ids, answers_BA), (mask, mask_BA), (labels, labels_BA)):
            whole[row, start : start + width] = part[row]
    return Rows(ids, mask, labels)


def loss_over_length(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Cross-entropy of each row, summed over its labels and divided by L - 1, whatever is padding: (B,).

    MiniGPT-4 ranks candidate answers by it (`reduction="none"`); they must be padded to one length to be compared.
    """
    losses = F.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    return losses.view(len(labels_BL), -1).mean(dim=1)
