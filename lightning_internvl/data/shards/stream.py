"""Batches of one process from its shard readers, with what was skipped for each and where each
reader then stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, groupby, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_internvl.data.bad_samples import SKIPPED, TRIES, Skipped, kind_of, reason_of, time_limit, writable
from lightning_internvl.data.collate.base import Collator, Prepared, unchanged
from lightning_internvl.data.collate.packing import Grouping, PackingWindow
from lightning_internvl.data.files.unread import UNREAD
from lightning_internvl.data.order.mixture import Mixture
from lightning_internvl.data.order.sampler import POSITION
from lightning_internvl.data.processors.pixels import as_bytes
from lightning_internvl.data.shards.cursor import Cursor, OpenShards, ReaderLayout, ShardCursor
from lightning_internvl.data.shards.datasets import ShardDataset
from lightning_internvl.data.shards.tar import Record, ShardError
from lightning_internvl.distributed.signals import shield_worker

# Of a reader, as checkpoints hold it: {"count": samples that it gave, "spots": {source: cursor},
# "waiting": [(number in the reader, source, cursor)]}.
Position = dict[str, Any]
Origin = tuple[int, str, Cursor]


class ShardReader:
    """One reader of all sources: a pure function of seed, number and position."""

    def __init__(
        self,
        number: int,
        data: ShardDataset,
        collate: Collator,
        layout: ReaderLayout,
        seed: int,
        position: Position,
        mixture: Mixture,
        open_shards: OpenShards,
        seconds: float | None,
    ) -> None:
        self.seconds = seconds
        self.number, self.data, self.collate = number, data, collate
        self.layout, self.seed, self.mixture = layout, seed, mixture
        self.count: int = position.get("count", 0)
        cursors = {name: Cursor(*cursor) for name, cursor in position.get("spots", {}).items()}
        self.cursors = {
            name: ShardCursor(
                shards,
                number,
                layout.readers,
                seed + place,
                data.shuffle,
                cursors.get(name),
                open_shards,
            )
            for place, (name, shards) in enumerate(data.sources.items())
        }
        self.records = {name: iter(cursor) for name, cursor in self.cursors.items()}
        self.skipped: list[Skipped] = []
        # Of samples that wait since an earlier part of the run, until `choose` reads them again.
        waiting = position.get("waiting", ())
        self.left: list[Origin] = [(count, name, Cursor(*cursor)) for count, name, cursor in waiting]
        self.window: PackingWindow[Origin] | None = None

    @property
    def position(self) -> Position:
        """Where the reader stands."""
        spots = {name: tuple(one.cursor) for name, one in self.cursors.items()}
        origins = self.window.origins if self.window else self.left
        waiting = [(count, source, tuple(cursor)) for count, source, cursor in origins]
        return {"count": self.count, "spots": spots, "waiting": waiting}

    def samples(self, count: int) -> list[Prepared]:
        """The next samples that can be used."""
        return [self._read()[1] for _ in range(count)]

    def choose(self, grouping: Grouping, count: int) -> list[list[Prepared]]:
        """Groups of samples that go together, chosen from those that wait."""
        if self.window is None:
            self.window = PackingWindow(grouping, lambda: [self._read()])
            self.window.add(self._read_again())
        return self.window.choose(count)

    def _read(self) -> tuple[Origin, Prepared]:
        """The next sample that can be used, with its origin; those before it are skipped.

        Raises:
            ValueError: if none of many records in a row can be used.
        """
        place = self.layout.place(self.number, self.count)
        source, failed = self.mixture.place(place)[0], 0
        while failed < TRIES:
            cursor, shard, record = next(self.records[source])
            try:
                if isinstance(record, ShardError):
                    raise record
                with time_limit(self.seconds):
                    prepared = self._prepared(source, shard, record, place)
            except Exception as error:
                failed += not isinstance(record, ShardError)
                key = writable(shard if isinstance(record, ShardError) else _key(shard, record))
                reason = said if key in (said := reason_of(error)) else f"{key}: {said}"
                counts = getattr(error, "counts", True)
                self.skipped.append(Skipped(place, key, kind_of(error), reason, counts, source))
            else:
                self.count += 1
                return (self.count - 1, source, cursor), prepared
        first = self.skipped[-failed].reason
        raise ValueError(f"source {source}: {failed} samples in a row cannot be used; the first one: {first}")

    def _prepared(self, source: str, shard: str, record: Record, place: int) -> Prepared:
        sample = self.data.sample(record, self.data.given[source])
        draw, unread = (self.seed, place), sample.pop(UNREAD, None)
        prepared = self.collate.prepare({**sample, "key": _key(shard, record), "draw": draw})
        return prepared if unread is None else {**prepared, UNREAD: unread}

    def _read_again(self) -> list[tuple[Origin, Prepared]]:
        """What was waiting, in its order; each block is read once."""
        found = []
        for (source, begin), origins in groupby(sorted(self.left, key=_block), key=_block):
            block = self.cursors[source].read_block(begin)
            for origin in origins:
                count, _, cursor = origin
                place = self.layout.place(self.number, count)
                record = block.records[cursor.place]
                found.append((origin, self._prepared(source, block.shard, record, place)))
        return sorted(found, key=lambda one: one[0][0])


class ShardStream(IterableDataset[dict[str, Any]]):
    """The batches of one process.

    Args:
        layout: the same for all processes, whatever their number.
        batches: of the whole stage; `start` of them are done.
        restored: positions of the processes that have written a checkpoint, however many there
            were.
        grouping: None: batches hold samples in the order in which they come.
        accumulate: batches of an optimizer step.
        seconds: that the preparation of a sample may take (see `bad_samples.time_limit`).

    Raises:
        ValueError: for numbers of processes that cannot share the readers or their groups, or
            positions of another layout.
    """

    def __init__(
        self,
        data: ShardDataset,
        collate: Collator,
        layout: ReaderLayout,
        *,
        rank: int = 0,
        world_size: int = 1,
        batches: int,
        start: int = 0,
        seed: int = 0,
        restored: Sequence[Mapping[str, Any]] = (),
        grouping: Grouping | None = None,
        num_workers: int = 0,
        accumulate: int = 1,
        seconds: float | None = None,
    ) -> None:
        self.seconds = seconds
        self.data, self.collate, self.layout, self.seed = data, collate, layout, seed
        self.grouping, self.num_workers = grouping, num_workers
        self.batches, self.start = batches, start
        self.own = [layout.readers_of(group, rank, world_size) for group in range(layout.groups)]
        self._check(restored, world_size)
        mine = {number for numbers in self.own for number in numbers}
        known = {number: one for state in restored for number, one in state["lanes"].items()}
        positions = {number: known[number] for number in known if number in mine}
        self.position: dict[str, Any] = {"layout": tuple(layout), "lanes": positions}
        self.readers: dict[int, ShardReader] = {}
        per_step = layout.readers_per_step * layout.samples * accumulate
        self.mixture, self.open_shards = data.mixture(per_step, seed), OpenShards()

    def _check(self, restored: Sequence[Mapping[str, Any]], world_size: int) -> None:
        layout, own = self.layout, len(self.own[0])
        if self.num_workers and layout.groups % self.num_workers:
            turns = f"the {layout.groups} turns"
            raise ValueError(f"{self.num_workers} data processes cannot share {turns} evenly")
        if self.grouping is not None and self.grouping.choices % own:
            raise ValueError(
                f"data.packing=bucketed takes a batch from one lane, but a process has {own} of "
                f"the {layout.readers_per_step} lanes of a step; give data.lanes={world_size}, or "
                "choose data.packing=true"
            )
        if any(tuple(one["layout"]) != tuple(layout) for one in restored):
            raise ValueError(
                f"the checkpoint stands in lanes {tuple(restored[0]['layout'])} (of a step, turns, "
                f"samples), the settings ask for {tuple(layout)}; go on with the batch size, "
                "data.lanes and data.turns that the run had"
            )
        if self.start and not restored:
            fault = "the checkpoint does not say where its data stood"
            raise ValueError(f"{fault}; resume the run that has written it")

    @property
    def samples_read(self) -> int:
        """Samples that were read before the beginning."""
        return sum(position["count"] for position in self.position["lanes"].values())

    def loader(self) -> DataLoader[Any]:
        """Batches, prepared by `num_workers` processes or here; their order is the same."""
        return DataLoader(
            self,
            batch_size=None,
            collate_fn=unchanged,
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches of this data process: every n-th, where there are n."""
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        self.readers, self.open_shards = {}, OpenShards()
        return (self.batch(number) for number in range(self.start + first, self.batches, every))

    def batch(self, number: int) -> dict[str, Any]:
        """The next batch of the group of readers whose turn it is."""
        readers = [self._reader(one) for one in self.own[number % self.layout.groups]]
        if self.grouping is None:
            samples = [one for reader in readers for one in reader.samples(self.layout.samples)]
            with as_bytes():
                found = self.collate.stack(samples)
        else:
            count = self.grouping.choices // len(readers)
            groups = [one for reader in readers for one in reader.choose(self.grouping, count)]
            samples = [one for group in groups for one in group]
            with as_bytes():
                found = self.grouping.batch(groups)
        skipped = [one for reader in readers for one in reader.skipped]
        for reader in readers:
            reader.skipped = []
        positions = {reader.number: reader.position for reader in readers}
        unread = [one[UNREAD] for one in samples if UNREAD in one]
        return {**found, SKIPPED: skipped, UNREAD: unread, POSITION: positions}

    def first(self, count: int) -> tuple[list[Prepared], list[Skipped]]:
        """The first samples, and what was skipped for them."""
        readers = [self._reader(number) for number in range(self.layout.readers)]
        samples = (one for reader in cycle(readers) for one in reader.samples(self.layout.samples))
        found = list(islice(samples, count))
        return found, [one for reader in readers for one in reader.skipped]

    @staticmethod
    def cursor_after(before: Mapping[str, Any], moved: Mapping[int, Position]) -> tuple[dict[str, Any], int]:
        """The position behind a batch, and how many samples were read for it."""
        known = before["lanes"]
        counts = {number: known[number]["count"] if number in known else 0 for number in moved}
        samples = sum(one["count"] - counts[number] for number, one in moved.items())
        return {**before, "lanes": {**known, **moved}}, samples

    def _reader(self, number: int) -> ShardReader:
        if number not in self.readers:
            self.readers[number] = ShardReader(
                number,
                self.data,
                self.collate,
                self.layout,
                self.seed,
                self.position["lanes"].get(number, {}),
                self.mixture,
                self.open_shards,
                self.seconds,
            )
        return self.readers[number]


def _key(shard: str, record: Record) -> str:
    return f"{shard}/{record['key']}"


def _block(origin: Origin) -> tuple[str, Cursor]:
    """The source and the block of a sample that was left waiting."""
    _, source, cursor = origin
    return source, cursor._replace(place=0)
