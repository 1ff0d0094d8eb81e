"""Products of embeddings, as contrastive losses and retrieval compare them."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor


def products(rows: Tensor, columns_CE: Tensor) -> Tensor:
    """All rows (..., E) with all columns (C, E): (..., C), in float32 whatever trains in bf16.

    Multiplied by a scale of 100, similarities that were computed in bf16 would be multiples of 0.25
    or 0.5.
    """
    exact = nullcontext() if rows.is_meta else torch.autocast(rows.device.type, enabled=False)
    with exact:  # the meta device, on which runs are planned, has no autocast
        return rows.float() @ columns_CE.float().T
