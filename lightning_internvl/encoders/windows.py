"""Windows over pictures of any size: which patches stand together, and how many there are in each.

A picture or video is a grid of t steps x h x w patches, which come block by block (`merge` x `merge`
patches, see `encoders.qwen2_vit.patch_places`). Windows are described by the order of the patches
and by lengths, as `layers.attention_masks.packed` reads them.

Letters: P patches of all pictures, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def step_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of each step of each picture."""
    return [h * w for t, h, w in grids for _ in range(t)]


def window_order(grids: Sequence[Grid], merge: int, side: int) -> tuple[Tensor, list[int]]:
    """The patches window by window: their places (P,) on the host, and the patches of each window.

    Windows begin at the top left of a step and are smaller at its right and lower edges; those of
    one size follow each other, so that they can be computed together. The patches of a step stay
    together. Source: Bai et al. 2025, section 2.1.1; official `get_window_index`.

    Args:
        merge: patches to a side of a block.
        side: blocks to a side of a window.
    """
    order, lengths, start = [], [], 0
    for t, h, w in grids:
        rows, columns = h // merge, w // merge
        blocks = torch.arange(rows * columns, device="cpu").reshape(rows, columns)
        windows = [window.flatten() for band in blocks.split(side) for window in band.split(side, dim=1)]
        windows.sort(key=len, reverse=True)
        patches = (torch.cat(windows)[:, None] * merge**2 + torch.arange(merge**2, device="cpu")).flatten()
        for _ in range(t):
            order.append(patches + start)
            lengths += [len(window) * merge**2 for window in windows]
            start += h * w
    return torch.cat(order), lengths
