"""Heads that say for every place of a picture what it shows, on frozen features.

Letters: N pictures, D width of the tower, G side of the square of patches, C classes, W width of a
    head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.middleware.probe import GlobalBatchNorm

POOLS = (1, 2, 3, 6)


class LinearHead(nn.Module):
    """A batch norm and a linear layer for every patch (InternVL, section 4.2)."""

    levels = 1

    def __init__(self, dim: int, classes: int, width: int) -> None:
        super().__init__()
        self.norm, self.head = GlobalBatchNorm(dim), nn.Linear(dim, classes)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """The last (N, D, G, G) -> (N, C, G, G)"""
        x = states[-1].permute(0, 2, 3, 1)
        return self.head(self.norm(x.flatten(0, 2)).unflatten(0, x.shape[:3])).permute(0, 3, 1, 2)


class UperNetHead(nn.Module):
    """Four hidden states as a pyramid of 4, 2, 1 and 1/2 times the patches' resolution, pooled at
    four sizes on top, summed downwards and fused at the finest (Xiao et al. 2018; a pyramid from a
    plain tower as in BEiT)."""

    levels = 4

    def __init__(self, dim: int, classes: int, width: int) -> None:
        super().__init__()
        twice = [nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(3)]
        self.scale = nn.ModuleList(
            [
                nn.Sequential(twice[0], nn.BatchNorm2d(dim), nn.GELU(), twice[1]),
                twice[2],
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.pools = nn.ModuleList(_block(dim, width, 1) for _ in POOLS)
        self.top = _block(dim + len(POOLS) * width, width, 3)
        self.sides = nn.ModuleList(_block(dim, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_block(width, width, 3) for _ in range(3))
        self.fuse, self.head = _block(4 * width, width, 3), nn.Conv2d(width, classes, 1)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Four (N, D, G, G), the earliest layer first -> (N, C, 4 G, 4 G)"""
        fine = [scale(state) for scale, state in zip(self.scale, states, strict=True)]
        coarse = fine[-1]
        pools = zip(POOLS, self.pools, strict=True)
        pooled = [_to(pool(F.adaptive_avg_pool2d(coarse, size)), coarse) for size, pool in pools]
        levels = [side(state) for side, state in zip(self.sides, fine, strict=False)]
        levels.append(self.top(torch.cat([coarse, *pooled], dim=1)))
        for place in (2, 1, 0):
            levels[place] = levels[place] + _to(levels[place + 1], levels[place])
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)]
        levels = [*smoothed, levels[-1]]
        return self.head(self.fuse(torch.cat([_to(level, levels[0]) for level in levels], dim=1)))


HEADS: dict[str, type[LinearHead] | type[UperNetHead]] = {"linear": LinearHead, "upernet": UperNetHead}


def _block(inputs: int, width: int, kernel: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def _to(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
