"""Batches of one process from its lanes, with what was skipped for each and where each lane stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_internvl.data.bad_samples import SKIPPED, TRIES, Skipped, kind_of
from lightning_internvl.data.collate.base import Collator, Prepared
from lightning_internvl.data.collate.packed import Grouping
from lightning_internvl.data.order.mixture import Mixture
from lightning_internvl.data.packed_stream import POSITION
from lightning_internvl.data.shards.cursor import Layout, Opened, Route, Spot
from lightning_internvl.data.shards.datasets import Streamed
from lightning_internvl.data.shards.tar import Record, ShardError
from lightning_internvl.distributed.signals import shield_worker

# Of a lane, plain: {"count": samples that it gave, "spots": {source: spot}, "waiting": [(number in the lane, source, spot)]}.
Position = dict[str, Any]


class Waiting(NamedTuple):
    """A prepared sample that was read and is not used yet, and where to read it again."""

    count: int
    source: str
    spot: Spot
    prepared: Prepared
    size: tuple[int, int]


class Lane:
    """One lane through all sources. What it gives is a pure function of the seed, its number and its position."""

    def __init__(
        self,
        number: int,
        data: Streamed,
        collate: Collator,
        layout: Layout,
        seed: int,
        position: Position,
        mixture: Mixture,
        opened: Opened,
    ) -> None:
        self.number, self.data, self.collate, self.layout, self.seed, self.mixture = number, data, collate, layout, seed, mixture
        self.count: int = position.get("count", 0)
        spots = position.get("spots", {})
        self.routes = {
            name: Route(shards, number, layout.lanes, seed + place, data.shuffle, Spot(*spots.get(name, ())), opened)
            for place, (name, shards) in enumerate(data.sources.items())
        }
        self.ways = {name: iter(route) for name, route in self.routes.items()}
        self.skipped: list[Skipped] = []
        waiting = position.get("waiting", ())  # in an earlier part of the run
        self.left = [(count, source, Spot(*spot)) for count, source, spot in waiting]
        self.waiting: list[Waiting] = []

    @property
    def position(self) -> Position:
        """Where the lane stands."""
        spots = {name: tuple(route.spot) for name, route in self.routes.items()}
        waiting = [(one.count, one.source, tuple(one.spot)) for one in self.waiting]
        return {"count": self.count, "spots": spots, "waiting": waiting}

    def samples(self, count: int) -> list[Prepared]:
        """The next samples that can be used."""
        return [self._next()[2] for _ in range(count)]

    def groups(self, grouping: Grouping, count: int) -> list[list[Prepared]]:
        """Samples that go together, chosen from those that wait."""
        if self.left:
            self.waiting, self.left = self._again(grouping), []
        found = []
        for _ in range(count):
            while not grouping.enough(_sizes(self.waiting)):
                source, spot, prepared = self._next()
                self.waiting.append(Waiting(self.count - 1, source, spot, prepared, grouping.size(prepared)))
            chosen = grouping.choose(_sizes(self.waiting))
            found.append([self.waiting[place].prepared for place in chosen])
            gone = set(chosen)
            self.waiting = [one for place, one in enumerate(self.waiting) if place not in gone]
        return found

    def _next(self) -> tuple[str, Spot, Prepared]:
        """The next sample that can be used, with its source and spot; those before it are skipped.

        Raises:
            ValueError: if none of many records in a row can be used.
        """
        place = self.layout.place(self.number, self.count)
        source, failed = self.mixture.place(place)[0], 0
        while failed < TRIES:
            spot, shard, record = next(self.ways[source])
            try:
                if isinstance(record, ShardError):
                    raise record
                prepared = self._prepared(source, shard, record, place)
            except ValueError as error:
                failed += not isinstance(record, ShardError)
                key = shard if isinstance(record, ShardError) else _key(shard, record)
                reason = str(error) if key in str(error) else f"{key}: {error}"
                self.skipped.append(Skipped(place, key, kind_of(error), reason, getattr(error, "counts", True), source))
            else:
                self.count += 1
                return source, spot, prepared
        first = self.skipped[-failed].reason
        raise ValueError(f"source {source}: {failed} samples in a row cannot be used; the first one: {first}")

    def _prepared(self, source: str, shard: str, record: Record, place: int) -> Prepared:
        sample = self.data.sample(record, self.data.given[source])
        return self.collate.prepare({**sample, "key": _key(shard, record), "draw": (self.seed, place)})

    def _again(self, grouping: Grouping) -> list[Waiting]:
        """What was waiting, read once more; each block once."""
        found = []
        for (source, where), some in groupby(sorted(self.left, key=_block), key=_block):
            block = self.routes[source].read(where)
            for count, _, spot in some:
                place = self.layout.place(self.number, count)
                prepared = self._prepared(source, block.shard, block.records[spot.place], place)
                found.append(Waiting(count, source, spot, prepared, grouping.size(prepared)))
        return sorted(found, key=lambda one: one.count)


class Lanes(IterableDataset[dict[str, Any]]):
    """The batches of one process.

    Args:
        layout: the same for all processes, whatever their number.
        batches: of the whole stage; `start` of them are done.
        restored: positions of the processes that have written a checkpoint, however many there were.
        grouping: None: batches hold samples in the order in which they come.
        accumulate: batches of an optimizer step.

    Raises:
        ValueError: for numbers of processes that cannot share the lanes or the turns, or positions of another layout.
    """

    def __init__(
        self,
        data: Streamed,
        collate: Collator,
        layout: Layout,
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
    ) -> None:
        self.data, self.collate, self.layout, self.seed, self.grouping = data, collate, layout, seed, grouping
        self.batches, self.start, self.num_workers = batches, start, num_workers
        self.own = [layout.own(turn, rank, world_size) for turn in range(layout.turns)]
        if num_workers and layout.turns % num_workers:
            raise ValueError(f"{num_workers} data processes cannot share the {layout.turns} turns evenly")
        if grouping is not None and grouping.groups % len(self.own[0]):
            raise ValueError(
                f"data.packing=bucketed takes a batch from one lane, but a process has {len(self.own[0])} of the {layout.width} "
                f"lanes of a step; give data.lanes={world_size}, or choose data.packing=true"
            )
        if any(tuple(one["layout"]) != tuple(layout) for one in restored):
            raise ValueError(
                f"the checkpoint stands in lanes {tuple(restored[0]['layout'])} (of a step, turns, samples), the settings ask "
                f"for {tuple(layout)}; go on with the batch size, data.lanes and data.turns that the run had"
            )
        if start and not restored:
            raise ValueError("the checkpoint does not say where its data stood; resume the run that has written it")
        mine = {number for lanes in self.own for number in lanes}
        known = {number: position for one in restored for number, position in one["lanes"].items()}
        self.position = {"layout": tuple(layout), "lanes": {number: known[number] for number in known if number in mine}}
        self.lanes: dict[int, Lane] = {}
        self.mixture, self.opened = data.mixture(layout.width * layout.samples * accumulate, seed), Opened()

    @property
    def drawn(self) -> int:
        """Samples that were read before the beginning."""
        return sum(position["count"] for position in self.position["lanes"].values())

    def loader(self) -> DataLoader[Any]:
        """Batches, prepared by `num_workers` processes or here; their order is the same."""
        return DataLoader(
            self,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches of this data process: every n-th, where there are n."""
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        self.lanes, self.opened = {}, Opened()
        return (self.batch(number) for number in range(self.start + first, self.batches, every))

    def batch(self, number: int) -> dict[str, Any]:
        """The next batch of the lanes whose turn it is."""
        lanes = [self._lane(one) for one in self.own[number % self.layout.turns]]
        if self.grouping is None:
            found = self.collate.stack([one for lane in lanes for one in lane.samples(self.layout.samples)])
        else:
            groups = self.grouping.groups // len(lanes)
            found = self.grouping.batch([group for lane in lanes for group in lane.groups(self.grouping, groups)])
        skipped = [one for lane in lanes for one in lane.skipped]
        for lane in lanes:
            lane.skipped = []
        return {**found, SKIPPED: skipped, POSITION: {lane.number: lane.position for lane in lanes}}

    def first(self, count: int) -> tuple[list[Prepared], list[Skipped]]:
        """The first samples, and what was skipped for them."""
        lanes = [self._lane(number) for number in range(self.layout.lanes)]
        found = islice((one for lane in cycle(lanes) for one in lane.samples(self.layout.samples)), count)
        return list(found), [one for lane in lanes for one in lane.skipped]

    @staticmethod
    def behind(before: Mapping[str, Any], moved: Mapping[int, Position]) -> tuple[dict[str, Any], int]:
        """The position behind a batch, and how many samples were read for it."""
        drawn = sum(one["count"] - before["lanes"].get(lane, {"count": 0})["count"] for lane, one in moved.items())
        return {**before, "lanes": {**before["lanes"], **moved}}, drawn

    def _lane(self, number: int) -> Lane:
        if number not in self.lanes:
            position = self.position["lanes"].get(number, {})
            self.lanes[number] = Lane(
                number, self.data, self.collate, self.layout, self.seed, position, self.mixture, self.opened
            )
        return self.lanes[number]


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _key(shard: str, record: Record) -> str:
    return f"{shard}/{record['key']}"


def _block(left: tuple[int, str, Spot]) -> tuple[str, Spot]:
    """The source and the block of a sample that was left waiting."""
    _, source, spot = left
    return source, spot._replace(place=0)


def _sizes(waiting: Sequence[Waiting]) -> np.ndarray:
    return np.array([one.size for one in waiting], dtype=np.int64).reshape(-1, 2)
