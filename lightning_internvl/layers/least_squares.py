"""A linear layer solved in closed form: ridge regression from sums over places, so that memory does
not grow with how many places there are.

Letters: N places, D width of what the layer reads, H width of what it gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 8192  # places that are widened to float64 at a time
NEGLIGIBLE = 1e-12  # of the largest variance: less is rounding of float32
# penalties that are tried, in units of the mean variance of what the layer reads
PENALTIES = tuple(10.0**power for power in range(-8, 3))
NAMES = ("count", "x", "y", "xx", "xy", "yy")


class NormalEquations:
    """The sums of a linear regression, in float64: number of places, sum x, sum y, X^T X, X^T Y and
    the sum of all y squared.

    They are sums over places, so those of several processes or runs are added.

    Args:
        inputs, outputs: D and H.
        sums: to begin with, by name; None: nothing was seen.
    """

    def __init__(self, inputs: int, outputs: int, sums: Mapping[str, Tensor] | None = None) -> None:
        shapes = {"count": (), "x": (inputs,), "y": (outputs,), "xx": (inputs, inputs), "xy": (inputs, outputs), "yy": ()}
        empty = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.sums: dict[str, Tensor] = empty if sums is None else dict(sums)

    @property
    def count(self) -> int:
        """Places that were seen."""
        return int(self.sums["count"])

    def add(self, x_ND: Tensor, y_NH: Tensor) -> None:
        """Take in places: what the layer reads there, and what it is to give."""
        for x_MD, y_MH in zip(x_ND.detach().split(ROWS), y_NH.detach().split(ROWS), strict=True):
            x_MD, y_MH = _wide(x_MD), _wide(y_MH)
            count = torch.tensor(float(len(x_MD)), dtype=torch.float64, device=x_MD.device)
            found = (count, x_MD.sum(dim=0), y_MH.sum(dim=0), x_MD.T @ x_MD, x_MD.T @ y_MH, y_MH.square().sum())
            for name, value in zip(NAMES, found, strict=True):
                self.sums[name] = self.sums[name].to(value.device) + value

    def explained(self, weight_HD: Tensor, bias_H: Tensor) -> float:
        """R^2 of a layer at these places: the share of the variance around the mean that it explains
        (1: all; below 0: worse than the mean)."""
        sums = self.sums
        mean_H = weight_HD @ sums["x"]
        squares = (weight_HD @ sums["xx"] * weight_HD).sum() + 2 * bias_H @ mean_H + sums["count"] * bias_H @ bias_H
        error = sums["yy"] - 2 * (weight_HD.T * sums["xy"]).sum() - 2 * bias_H @ sums["y"] + squares
        spread = sums["yy"] - sums["y"] @ sums["y"] / sums["count"]
        return float(1 - error / spread.clamp(min=torch.finfo(torch.float64).tiny))


class Solution(NamedTuple):
    """A solved layer.

    Attributes:
        weight, bias: (H, D) and (H,), float64; the bias is 0 for a layer without one.
        explained: R^2 at the places that the solution has not seen.
        rank: directions of what the layer reads that differ between places.
        penalty: the one that was best, of `PENALTIES`.
        places: that it was solved from.
    """

    weight: Tensor
    bias: Tensor
    explained: float
    rank: int
    penalty: float
    places: int


def solve(seen: NormalEquations, held_out: NormalEquations, prior_HD: Tensor | None = None, *, bias: bool = True) -> Solution:
    """The layer that comes nearest to its targets, |Y - X W^T - b|^2 + penalty |W - prior|^2, with the
    penalty that explains places best which it has not seen.

    Args:
        prior_HD: the weight that is kept where places say nothing; None: 0.
        bias: whether the layer has one; it is not penalised.

    Raises:
        ValueError: if there are no places to solve from, or none to judge by.
    """
    if not seen.count or not held_out.count:
        raise ValueError(f"a layer is solved from {seen.count} places and judged at {held_out.count}; both must be above 0")
    sums, count = seen.sums, seen.sums["count"]
    x_D, y_H = sums["x"] / count, sums["y"] / count
    if not bias:
        x_D, y_H = torch.zeros_like(x_D), torch.zeros_like(y_H)
    variance_DD, shared_DH = sums["xx"] / count - x_D.outer(x_D), sums["xy"] / count - x_D.outer(y_H)
    prior_DH = torch.zeros_like(shared_DH) if prior_HD is None else _wide(prior_HD).T.to(shared_DH.device)
    values_D, vectors_DD = torch.linalg.eigh(variance_DD)
    values_D = values_D.clamp(min=0)
    missing_DH = vectors_DD.T @ (shared_DH - variance_DD @ prior_DH)  # what the prior leaves, by direction
    best: Solution | None = None
    for penalty in PENALTIES:
        added = penalty * values_D.mean().clamp(min=torch.finfo(torch.float64).tiny)
        weight_HD = (prior_DH + vectors_DD @ (missing_DH / (values_D + added)[:, None])).T
        bias_H = y_H - weight_HD @ x_D
        explained = held_out.explained(weight_HD, bias_H)
        if best is None or explained > best.explained:
            rank = int((values_D > NEGLIGIBLE * values_D.max()).sum())
            best = Solution(weight_HD, bias_H, explained, rank, penalty, seen.count)
    assert best is not None  # there are penalties
    return best


def _wide(x: Tensor) -> Tensor:
    """In float64; on the CPU where a device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()
