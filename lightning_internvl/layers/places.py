"""Where a mask is true, without a wait of the host where it knows how often."""

from __future__ import annotations

import torch
from torch import Tensor


def true_places(mask: Tensor, count: int | None = None) -> tuple[Tensor, ...]:
    """Places of what is true, in order, one tensor a dimension.

    Args:
        count: how many there are, as the host knows it from elsewhere; a GPU is then not asked, and
            raises for itself where it counts otherwise.
    """
    if count is None or not mask.is_cuda:
        return mask.nonzero(as_tuple=True)  # their number is needed to go on: the host waits
    torch._assert_async(mask.sum() == count, f"{count} places were told, the mask has another number")
    return torch.nonzero_static(mask, size=count).unbind(1)
