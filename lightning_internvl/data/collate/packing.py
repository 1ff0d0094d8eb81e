"""Which samples share a batch or a row: they are chosen from a window of waiting samples.

A row is filled within budgets of tokens and of image tiles. It begins with the sample that has
waited longest, so that none waits for ever; then comes, again and again, the one that leaves the
least room of both kinds. All costs depend on the window, none on the data set.

Letters: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from lightning_internvl.data.collate.base import Prepared

PACKED = "packed"  # of `choices.PACKINGS`
WINDOW_ROWS = 24  # rows' worth of samples that wait; more fill rows better and cost memory
TAKEN = np.iinfo(np.int64).max

Origin = TypeVar("Origin")


class Grouping(Protocol):
    """How batches are made of waiting samples, the oldest first.

    A batch is made of `choices` groups of samples, chosen one after the other.
    """

    choices: int

    def size(self, prepared: Prepared) -> tuple[int, int]:
        """What counts in the choice: tokens and visual tokens of a sample."""

    def enough(self, sizes_N2: np.ndarray) -> bool:
        """Whether so many wait that one may choose."""

    def choose(self, sizes_N2: np.ndarray) -> list[int]:
        """Places of those that go together."""

    def batch(self, groups: Sequence[Sequence[Prepared]]) -> dict[str, Any]:
        """What was chosen, as a batch."""


class WaitingSample(NamedTuple, Generic[Origin]):
    """A prepared sample that is in no batch yet.

    Args:
        origin: what it takes to read the sample again after a resume.
        size: as the grouping counts it.
    """

    origin: Origin
    prepared: Prepared
    size: tuple[int, int]


class PackingWindow(Generic[Origin]):
    """Samples that wait in the order in which they were read, until a grouping chooses them.

    What is chosen is a function of what is read and of what waits, so a window that is filled again
    with the samples of `origins` goes on as if it had not been stopped.

    Args:
        read: the next samples, one or more, each with its origin.
    """

    def __init__(self, grouping: Grouping, read: Callable[[], Iterable[tuple[Origin, Prepared]]]) -> None:
        self.grouping, self.read = grouping, read
        self.waiting: list[WaitingSample[Origin]] = []

    @property
    def origins(self) -> list[Origin]:
        """Of the samples that wait, the oldest first."""
        return [one.origin for one in self.waiting]

    def add(self, samples: Iterable[tuple[Origin, Prepared]]) -> None:
        """Let samples wait behind all others."""
        size = self.grouping.size
        self.waiting += [WaitingSample(origin, one, size(one)) for origin, one in samples]

    def choose(self, count: int) -> list[list[Prepared]]:
        """The next groups of samples; as many are read as the grouping chooses from."""
        groups = []
        for _ in range(count):
            while not self.grouping.enough(self._sizes()):
                self.add(self.read())
            places = self.grouping.choose(self._sizes())
            groups.append([self.waiting[place].prepared for place in places])
            gone = set(places)
            self.waiting = [one for place, one in enumerate(self.waiting) if place not in gone]
        return groups

    def _sizes(self) -> np.ndarray:
        return np.array([one.size for one in self.waiting], dtype=np.int64).reshape(-1, 2)


def choose_row(tokens_N: np.ndarray, tiles_N: np.ndarray, max_tokens: int, max_tiles: int | None = None) -> list[int]:
    """Places of waiting samples for the next row: the oldest at 0, then what fills best.

    Args:
        tokens_N, tiles_N: int64, of the waiting samples, the oldest first; each of them fits into a
            row.
        max_tiles: None: tokens alone decide.
    """
    room, tile_room = max_tokens - tokens_N[0], 0 if max_tiles is None else max_tiles - tiles_N[0]
    tokens, tiles = tokens_N.copy(), np.zeros_like(tiles_N) if max_tiles is None else tiles_N
    tokens[0] = TAKEN
    row, places = [0], np.arange(len(tokens))
    while True:
        # Rooms only shrink
        places = places[(tokens[places] <= room) & (tiles[places] <= tile_room)]
        if len(places) == 0:
            return row
        tokens_left = (room - tokens[places]) / max_tokens
        tiles_left = (tile_room - tiles[places]) / (max_tiles or 1)
        best = int(places[(tokens_left**2 + tiles_left**2).argmin()])  # of equals the oldest
        room, tile_room = room - tokens[best], tile_room - tiles[best]
        tokens[best] = TAKEN
        row.append(best)


def choose_alike(tokens_N: np.ndarray, count: int) -> list[int]:
    """Places of the oldest waiting sample and the `count` - 1 nearest in length."""
    return sorted(np.argsort(np.abs(tokens_N - tokens_N[0]), kind="stable")[:count].tolist())


def is_enough(tokens: int, tiles: int, max_tokens: int, max_tiles: int | None, window: int) -> bool:
    """Whether waiting samples of so many tokens and tiles could fill `window` rows."""
    return tokens >= window * max_tokens or (max_tiles is not None and tiles >= window * max_tiles)
