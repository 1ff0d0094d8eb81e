"""The order of samples from shards of unknown length, and cursors to go on exactly.

The samples of a step come from several readers, equally many from each, and steps take turns among
groups of readers (the settings `data.lanes`, readers of a step, and `data.turns`, groups). A reader
reads units (a shard, or a part of one where there are fewer shards than readers) in a new order
each epoch, dealt out to the readers like cards, and the records of a unit in blocks that are
shuffled. All of it follows from the seed and the reader's number, so a few numbers say where a
reader stands. A process owns some readers of each group, a data process some of the groups: the
order of all samples depends on the number of neither.
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


class Cursor(NamedTuple):
    """Where a sample of one source is read again.

    Args:
        unit: of the reader.
        start: the record of the shard at which a block begins.
        place: in the shuffled block.
        number, byte: the mark of a record up to that at which the block begins.
    """

    unit: int = 0
    start: int = 0
    place: int = 0
    number: int = 0
    byte: int = 0


class ReaderLayout(NamedTuple):
    """How samples are shared out among readers. Reader r of group g has the number g *
    `readers_per_step` + r.

    Args:
        readers_per_step: readers of a group; a step reads from all readers of one group.
        groups: of readers.
        samples: that one reader gives to a step.
    """

    readers_per_step: int
    groups: int
    samples: int

    @classmethod
    def for_step(cls, lanes: int, turns: int, samples: int) -> ReaderLayout:
        """For steps of so many samples, from `lanes` readers or, where they do not divide them,
        from the most that do."""
        readers = math.gcd(lanes, samples)
        return cls(readers, turns, samples // readers)

    @property
    def readers(self) -> int:
        """Readers in all."""
        return self.readers_per_step * self.groups

    def readers_of(self, step: int, rank: int, world_size: int) -> range:
        """The readers that a process reads from in a step.

        Raises:
            ValueError: if the processes cannot share them evenly.
        """
        readers = self.readers_per_step
        if readers % world_size:
            fitting = ", ".join(str(n) for n in range(1, readers + 1) if readers % n == 0)
            raise ValueError(
                f"{world_size} processes cannot share the {readers} lanes of a step evenly; fitting numbers "
                f"of processes: {fitting}; a new run may have more lanes: data.lanes={math.lcm(readers, world_size)}"
            )
        share = readers // world_size
        first = step % self.groups * readers + rank * share
        return range(first, first + share)

    def place(self, reader: int, count: int) -> int:
        """The place in the stage's data of a reader's sample of this number; none comes twice."""
        group, piece = divmod(reader, self.readers_per_step)
        visit, inside = divmod(count, self.samples)
        step = visit * self.groups + group
        return (step * self.readers_per_step + piece) * self.samples + inside


class ReadRecord(NamedTuple):
    """A record with the cursor from which it can be read again, or what is wrong with a shard."""

    cursor: Cursor
    shard: str
    record: Record | ShardError


class RecordBlock(NamedTuple):
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


class OpenShards:
    """Shards that are read on, each by one `ShardCursor`; of too many the one that has waited
    longest is closed."""

    def __init__(self) -> None:
        self.kept: OrderedDict[ShardCursor, tuple[tuple[int, int], Iterator[Record]]] = OrderedDict()

    def take(self, reader: ShardCursor, where: tuple[int, int]) -> Iterator[Record] | None:
        """The shard that a cursor has left open, if it stands at that unit and record."""
        found = self.kept.pop(reader, None)
        return found[1] if found is not None and found[0] == where else None

    def keep(self, reader: ShardCursor, where: tuple[int, int], records: Iterator[Record]) -> None:
        """Leave a shard open."""
        self.kept[reader] = (where, records)
        if len(self.kept) > KEPT_OPEN:
            self.kept.popitem(last=False)


class ShardCursor:
    """One reader's way through one source, without end.

    Args:
        number: of the reader among `readers`.
        shuffle: records of a block; all of them are in memory.
        cursor: where it goes on.
    """

    def __init__(
        self,
        shards: Shards,
        number: int,
        readers: int,
        seed: int,
        shuffle: int,
        cursor: Cursor | None = None,
        open_shards: OpenShards | None = None,
    ) -> None:
        self.shards, self.number, self.readers = shards, number, readers
        self.seed, self.shuffle = seed, shuffle
        self.open_shards = open_shards or OpenShards()
        self.parts = -(-readers // len(shards))
        self.cursor = cursor or Cursor()

    def __iter__(self) -> Iterator[ReadRecord]:
        """What comes next, or once a broken shard's fault; `cursor` moves to the next sample.

        Raises:
            ValueError: if there are no samples in many shards.
        """
        empty = 0
        while empty < TRIES:
            begin = self.cursor
            block = self.read_block(begin)
            # Else it was told before the cursor was saved
            if block.fault is not None and begin.place == 0:
                yield ReadRecord(begin, block.shard, block.fault)
            for place in range(begin.place, len(block.records)):
                record, block.records[place] = block.records[place], {}  # memory
                self.cursor = begin._replace(place=place + 1)
                yield ReadRecord(begin._replace(place=place), block.shard, record)
            empty = 0 if block.records else empty + (begin.start == 0)
            self.cursor = Cursor(begin.unit + 1)
            if not block.last:
                self.cursor = Cursor(begin.unit, begin.start + self.step, 0, *block.mark)
        last = block.fault or block.shard
        raise ValueError(f"{TRIES} shards in a row hold no sample; the last one is {last}")

    @property
    def step(self) -> int:
        """Records of a shard that all its parts read in the time of a block."""
        return self.shuffle * self.parts

    def read_block(self, cursor: Cursor) -> RecordBlock:
        """The block at a cursor, from the shard that is open there or else from the mark."""
        unit, start = cursor.unit, cursor.start
        mark: Mark = (cursor.number, cursor.byte)
        shard, part = self._shard(unit)
        reading = self.open_shards.take(self, (unit, start)) or self.shards.read_near(shard, start, mark)
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
            self.open_shards.keep(self, (unit, start + seen), reading)
        rng = np.random.default_rng([self.seed, self._slot(unit), start])
        records = [found[one] for one in rng.permutation(len(found))]
        return RecordBlock(self.shards.name(shard), records, last, mark, fault)

    def _slot(self, unit: int) -> int:
        """Units are dealt out to the readers one by one, over all epochs."""
        return unit * self.readers + self.number

    def _shard(self, unit: int) -> tuple[int, int]:
        """The shard of a unit and which part of it."""
        units = len(self.shards) * self.parts
        epoch, place = divmod(self._slot(unit), units)
        return divmod(int(permuted(np.array([place]), units, self.seed, epoch)[0]), self.parts)
