"""Learned positions of a square table at the patches of pictures of any size (Qwen3-VL, official
`modeling_qwen3_vl.py`, `fast_pos_embed_interpolate`).

Letters: P patches of all pictures, one after the other, S side of the table, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_internvl.encoders.windows import Grid
from lightning_internvl.layers.attention_masks import on_device


def interpolated(table: nn.Embedding, side: int, places_P2: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The positions of patches: (P, D), bilinear, corners on corners.

    Args:
        table: (S * S, D), row by row.
        side: S.
        places_P2: row and column of each patch.
        grids: (t, h, w) of each picture.
    """
    last = torch.tensor([(max(h - 1, 1), max(w - 1, 1)) for _, h, w in grids], device="cpu")
    counts = torch.tensor([t * h * w for t, h, w in grids], device="cpu")
    last_P2 = on_device(last.repeat_interleave(counts, dim=0), places_P2.device)
    at = places_P2.float() * (side - 1) / last_P2
    low = at.floor()
    share, low = at - low, low.long()
    near = torch.stack([low, (low + 1).clamp(max=side - 1)])  # (2, P, 2), the neighbours to both sides
    weight = torch.stack([1 - share, share])
    indices = near[:, None, :, 0] * side + near[None, :, :, 1]
    weights = weight[:, None, :, 0] * weight[None, :, :, 1]
    return (table(indices) * weights[..., None]).sum(dim=(0, 1))
