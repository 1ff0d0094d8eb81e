"""The order of samples from shards whose records nobody has counted, and the positions from which it goes on exactly.

The samples of a step come from `width` lanes, equally many from each, and steps take turns among `turns` such sets of lanes. A
lane is a reader whose way is fixed by the seed: units (a shard, or a part of one where there are fewer shards than lanes) in a
new order each epoch, dealt out to the lanes like cards, and the records of a unit in blocks that are shuffled. Where a lane
stands is told by a few numbers. A process owns some lanes of each step, a data process some of the turns; so the order of all
samples depends on the number of neither.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from lightning_internvl.data.bad_samples import TRIES
from lightning_internvl.data.order.sampler import permuted
from lightning_internvl.data.shards.tar import Mark, Record, ShardError, Shards

KEPT_OPEN = 256  # shards; a process may have 1024 files open on many machines


class Spot(NamedTuple):
    """Where to read a sample of a lane's source again.

    Args:
        unit: of the lane.
        start: the record of the shard at which a block begins.
        place: in the shuffled block.
        number, byte: the mark of a record up to that at which the block begins.
    """

    unit: int = 0
    start: int = 0
    place: int = 0
    number: int = 0
    byte: int = 0


class Layout(NamedTuple):
    """How samples are shared out among lanes.

    Args:
        width: lanes that a step reads from; they stand side by side in `turn` * `width` + piece.
        turns: sets of lanes.
        samples: that one lane gives to a step.
    """

    width: int
    turns: int
    samples: int

    @classmethod
    def of(cls, lanes: int, turns: int, step: int) -> Layout:
        """For steps of so many samples, from `lanes` lanes or, where they do not divide them, from the most that do."""
        width = math.gcd(lanes, step)
        return cls(width, turns, step // width)

    @property
    def lanes(self) -> int:
        """Lanes in all."""
        return self.width * self.turns

    def own(self, step: int, rank: int, world_size: int) -> range:
        """The lanes that a process reads from in a step.

        Raises:
            ValueError: if the processes cannot share them evenly.
        """
        if self.width % world_size:
            fitting = ", ".join(str(n) for n in range(1, self.width + 1) if self.width % n == 0)
            raise ValueError(
                f"{world_size} processes cannot share the {self.width} lanes of a step evenly; fitting numbers of processes: "
                f"{fitting}; a new run may have more lanes: data.lanes={math.lcm(self.width, world_size)}"
            )
        share = self.width // world_size
        first = step % self.turns * self.width + rank * share
        return range(first, first + share)

    def place(self, lane: int, count: int) -> int:
        """The place in the stage's data of a lane's sample of this number; none comes twice."""
        turn, piece = divmod(lane, self.width)
        visit, inside = divmod(count, self.samples)
        return ((visit * self.turns + turn) * self.width + piece) * self.samples + inside


class Found(NamedTuple):
    """A record with the spot from which it can be read again, or what is wrong with a shard."""

    spot: Spot
    shard: str
    record: Record | ShardError


class Block(NamedTuple):
    """Neighbouring records of a unit in the order in which they are used.

    Args:
        last: whether the unit ends with them.
        mark: of the last record that was read.
    """

    shard: str
    records: list[Record]
    last: bool
    mark: Mark
    fault: ShardError | None


class Opened:
    """Shards that are read on, each by one route; the one that has waited longest is closed where there are too many."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Route, tuple[tuple[int, int], Iterator[Record]]] = OrderedDict()

    def take(self, route: Route, where: tuple[int, int]) -> Iterator[Record] | None:
        """What a route has kept, if it stands there."""
        found = self.kept.pop(route, None)
        return found[1] if found is not None and found[0] == where else None

    def keep(self, route: Route, where: tuple[int, int], records: Iterator[Record]) -> None:
        """Leave a shard open."""
        self.kept[route] = (where, records)
        if len(self.kept) > KEPT_OPEN:
            self.kept.popitem(last=False)


class Route:
    """The way of one lane through one source, without end.

    Args:
        number: of the lane among `lanes`.
        shuffle: records of a block; all of them are in memory.
        spot: where it goes on.
    """

    def __init__(
        self,
        shards: Shards,
        number: int,
        lanes: int,
        seed: int,
        shuffle: int,
        spot: Spot | None = None,
        opened: Opened | None = None,
    ) -> None:
        self.shards, self.number, self.lanes, self.seed, self.shuffle = shards, number, lanes, seed, shuffle
        self.opened = opened or Opened()
        self.parts = -(-lanes // len(shards))
        self.spot = spot or Spot()

    def __iter__(self) -> Iterator[Found]:
        """What comes next, and of a broken shard its fault, once. `spot` is then that of the sample behind it.

        Raises:
            ValueError: if there are no samples in many shards.
        """
        empty = 0
        while empty < TRIES:
            spot = self.spot
            block = self.read(spot)
            if block.fault is not None and spot.place == 0:  # else it was told before the position was kept
                yield Found(spot, block.shard, block.fault)
            for place in range(spot.place, len(block.records)):
                record, block.records[place] = block.records[place], {}  # memory
                self.spot = spot._replace(place=place + 1)
                yield Found(spot._replace(place=place), block.shard, record)
            empty = 0 if block.records else empty + (spot.start == 0)
            self.spot = Spot(spot.unit + 1) if block.last else Spot(spot.unit, spot.start + self.step, 0, *block.mark)
        raise ValueError(f"{TRIES} shards in a row hold no sample; the last one is {block.fault or block.shard}")

    @property
    def step(self) -> int:
        """Records of a shard that all its parts read in the time of a block."""
        return self.shuffle * self.parts

    def read(self, spot: Spot) -> Block:
        """The block of a spot, from the shard that is open there or else from the mark."""
        unit, start, _, *mark = spot
        shard, part = self._shard(unit)
        reading = self.opened.take(self, (unit, start)) or self.shards.read_near(shard, start, tuple(mark))
        fault, found, seen = None, list[Record](), 0
        try:
            for record in islice(reading, self.step):
                if (start + seen) % self.parts == part:
                    found.append(record)
                mark = getattr(record, "mark", mark)
                seen += 1
        except ShardError as error:
            fault = error
        last = seen < self.step
        if not last:
            self.opened.keep(self, (unit, start + seen), reading)
        order = np.random.default_rng([self.seed, self._slot(unit), start]).permutation(len(found))
        return Block(self.shards.name(shard), [found[one] for one in order], last, tuple(mark), fault)

    def _slot(self, unit: int) -> int:
        """Units are dealt out to the lanes one by one, over all epochs."""
        return unit * self.lanes + self.number

    def _shard(self, unit: int) -> tuple[int, int]:
        """The shard of a unit and which part of it."""
        units = len(self.shards) * self.parts
        epoch, place = divmod(self._slot(unit), units)
        return divmod(int(permuted(np.array([place]), units, self.seed, epoch)[0]), self.parts)
