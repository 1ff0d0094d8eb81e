"""Embeddings of one language model in the space of another, by the words that both have.

Letters: N embeddings, V shared words, H width of the one language model, G of the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # embeddings that are compared with all words at a time


def in_words_of(x_NH: Tensor, own_VH: Tensor, other_VG: Tensor, temperature: float) -> Tensor:
    """The mean of the other language model's words, each by its nearness in the own one: (N, G).

    Nearness is the softmax of the cosine, around the mean word, over a temperature.

    Args:
        own_VH, other_VG: embeddings of the same words in both.
        temperature: above 0; the smaller, the more the nearest word counts.
    """
    centre_H = own_VH.mean(dim=0)
    words_VH = F.normalize(own_VH - centre_H, dim=-1)
    near = (F.normalize(x_MH - centre_H, dim=-1) @ words_VH.T for x_MH in x_NH.split(ROWS))
    return torch.cat([(near_MV / temperature).softmax(dim=-1) @ other_VG for near_MV in near])
