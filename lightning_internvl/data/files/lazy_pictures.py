"""Pictures that are read as they are asked for, some at a time; none is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes beside other threads
AHEAD = 4  # pictures a thread
Pictures = Sequence[np.ndarray] | np.ndarray  # (H, W, 3) uint8 each


class LazyPictures(Sequence[np.ndarray]):
    """Pictures (H, W, 3) uint8 in the order of `items`; a slice holds some of them and reads none.

    Args:
        items: what names each picture.
        read: called with one of the items.
    """

    def __init__(self, items: Sequence[Any], read: Callable[[Any], np.ndarray]) -> None:
        self.items, self.read = items, read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: int | slice) -> Any:
        if isinstance(which, slice):
            return LazyPictures(self.items[which], self.read)
        return self.read(self.items[which])

    def __iter__(self) -> Iterator[np.ndarray]:
        step = THREADS * AHEAD
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(self), step):
                yield from pool.map(self.read, self.items[start : start + step])


def evenly_spread(total: int, samples: int | None) -> list[int]:
    """At most `samples` of `total` places, spread evenly; all where it is None.

    Raises:
        ValueError: for a number below 1.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"{samples=} must be 1 or more; leave it out to measure all")
    wanted = min(samples or total, total)
    return np.linspace(0, total - 1, wanted).round().astype(int).tolist()
