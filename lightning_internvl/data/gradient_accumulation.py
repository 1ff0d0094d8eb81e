"""Losses over the micro-batches of an optimizer step: sums over the window's count.

Lightning adds the gradients of k micro-batches, each divided by k. That is a mean of means: a
micro-batch with few labels would weigh as much as one with many. So k micro-batches are read ahead
and each carries the counts of all of them (`AccumulationWindows`); a micro-batch whose loss is a
mean over C of the window's N items then counts k C / N times (`window_shares`), which makes the
step that of one batch with all items. A window that ends early, because the data does, has fewer
micro-batches and no smaller step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_internvl.distributed.collectives import data_parallel_group, world_size

COUNTS = "counts"  # what each batch carries: its own counts
WINDOW_COUNTS = "window"  # what each batch carries: the counts of all micro-batches of its step
Counts = Mapping[str, float]


class AccumulationWindows:
    """Batches that know their window, read so far ahead: as many wait in memory as a step has.

    Args:
        batches: tensors and lists by name.
        length: micro-batches of a step.
        count: what each loss of a batch is divided by.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, Any]],
        length: int,
        count: Callable[[dict[str, Any]], Counts],
    ) -> None:
        self.batches, self.length, self.count = batches, length, count

    def __len__(self) -> int:
        # TypeError where there is no length, which Lightning understands
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.batches)
        window = list(islice(batches, self.length))
        while window:
            counts = [self.count(batch) for batch in window]
            following: list[dict[str, Any]] = []
            while window:
                yield {**window.pop(0), WINDOW_COUNTS: counts}
                # One for one, so that no step waits for a whole window
                following += islice(batches, 1)
            window = following


def window_shares(window: Sequence[Counts], place: int, length: int, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """How often losses of one micro-batch count, if all are then divided by `length`.

    Args:
        window: this rank's counts of each micro-batch of the step; all ranks have equally many.
        place: of the micro-batch among them.

    Returns:
        the factors of losses that are counted, and that of all others, whose micro-batches weigh
        the same
    """
    names = list(window[place])
    rows = [[one[name] for name in names] for one in window]
    counts = torch.tensor(rows, pin_memory=device.type == "cuda")
    counts = counts.to(device, non_blocking=True)
    if world_size() > 1 and names:
        dist.all_reduce(counts, group=data_parallel_group())
    shares = length * counts[place] / counts.sum(dim=0).clamp(min=1)
    return dict(zip(names, shares.unbind(), strict=True)), length / len(window)
