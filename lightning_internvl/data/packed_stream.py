"""Batches of samples that are chosen from a window of waiting ones, and the position at which such a stream goes on."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_internvl.data.bad_samples import SKIPPED, Skipped
from lightning_internvl.data.collate.base import Prepared
from lightning_internvl.data.collate.packed import Grouping
from lightning_internvl.data.order.sampler import StepBatchSampler
from lightning_internvl.distributed.signals import shield_worker

AHEAD = 2  # batches that are put together before they are asked for
CHUNK = 8  # samples that one process prepares at a time
POSITION = "position"  # what travels with a batch: where the stream goes on behind it
ARRAYS = ("pictures", "videos")

Position = dict[str, Any]  # {"chunk": the next one of this process, "waiting": places of those that were read and not yet used}
Found = list[tuple[Prepared, list[Skipped]]]


class Waiting(NamedTuple):
    """A prepared sample, and the place in the stage's data that it was drawn for."""

    place: int
    prepared: Prepared
    size: tuple[int, int]


class Stream:
    """Batches of one process: chunks of samples come in the order of the sampler, wait, and are chosen from by `grouping`.

    What a batch holds is a pure function of the seed, the process and the position, whatever prepares the samples. A stream
    that goes on prepares again what was waiting, and nothing before it.

    Args:
        samples: prepared samples, and those skipped for each, by (index, place).
        sampler: of `CHUNK` samples a step.
        batches: of the whole stage; `start` of them are done.
        position: where the last of these ended; None: at the beginning.
        num_workers: processes that prepare samples; 0 prepares them here.
    """

    def __init__(
        self,
        samples: Dataset[tuple[Prepared, list[Skipped]]],
        sampler: StepBatchSampler,
        grouping: Grouping,
        *,
        batches: int,
        start: int = 0,
        position: Position | None = None,
        num_workers: int = 0,
    ) -> None:
        self.samples, self.sampler, self.grouping, self.num_workers = samples, sampler, grouping, num_workers
        self.batches, self.start = batches, start
        self.position = position or {"chunk": 0, "waiting": []}

    @property
    def drawn(self) -> int:
        """Samples that were read before the stream's beginning."""
        return self.position["chunk"] * CHUNK

    def __iter__(self) -> Iterator[dict[str, Any]]:
        drawn = iter(self._chunks(self.position["chunk"], self.position["waiting"]))
        return _ahead(self._batches(drawn)) if self.num_workers else self._batches(drawn)

    @staticmethod
    def behind(before: Position, now: Position) -> tuple[Position, int]:
        """The position behind a batch, and how many samples were read for it."""
        return now, (now["chunk"] - before["chunk"]) * CHUNK

    def _batches(self, drawn: Iterator[Found]) -> Iterator[dict[str, Any]]:
        chunk, places = self.position["chunk"], self.position["waiting"]
        waiting: list[Waiting] = []
        while len(waiting) < len(places):  # skipped for them is counted already
            waiting += self._read(places[len(waiting) : len(waiting) + CHUNK], next(drawn))
        for _ in range(self.start, self.batches):
            groups, skipped = [], list[Skipped]()
            for _ in range(self.grouping.groups):
                while not self.grouping.enough(_sizes(waiting)):
                    found = next(drawn)
                    waiting += self._read(self.sampler.positions(chunk), found)
                    skipped += [one for _, some in found for one in some]
                    chunk += 1
                chosen = self.grouping.choose(_sizes(waiting))
                groups.append([waiting[place].prepared for place in chosen])
                gone = set(chosen)
                waiting = [one for place, one in enumerate(waiting) if place not in gone]
            position = {"chunk": chunk, "waiting": [one.place for one in waiting]}
            yield {**_pinned(self.grouping.batch(groups)), SKIPPED: skipped, POSITION: position}

    def _chunks(self, chunk: int, places: Sequence[int]) -> DataLoader[Any]:
        return DataLoader(
            self.samples,
            batch_sampler=_Draws(self.sampler, chunk, places),
            collate_fn=_to_tensors if self.num_workers else _as_it_is,
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            prefetch_factor=2 if self.num_workers else None,
        )

    def _read(self, places: Sequence[int], found: Found) -> list[Waiting]:
        prepared = [_to_arrays(one) if self.num_workers else one for one, _ in found]
        return [Waiting(place, one, self.grouping.size(one)) for place, one in zip(places, prepared, strict=True)]


class _Draws(Sampler[list[tuple[int, int]]]):
    """Pairs of index and place: first of those that waited, then of all chunks from one on."""

    def __init__(self, sampler: StepBatchSampler, chunk: int, places: Sequence[int]) -> None:
        self.sampler, self.chunk, self.places = sampler, chunk, places

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.places), CHUNK):
            yield self.sampler.drawn(self.places[first : first + CHUNK])
        for chunk in range(self.chunk, sys.maxsize):
            yield self.sampler.drawn(self.sampler.positions(chunk))


def dealt(positions: Sequence[Position], world_size: int) -> list[Position]:
    """Positions of another number of processes: what waited and what only some had come to is dealt out, so none is lost.

    Args:
        positions: of the processes that there were, by their number.
    """
    before, width = len(positions), world_size * CHUNK
    if before == world_size:
        return list(positions)
    front = max(position["chunk"] for position in positions) * before * CHUNK
    chunk = -(-front // width)
    behind = [place for position in positions for place in position["waiting"]]
    for rank, position in enumerate(positions):
        for step in range(position["chunk"], -(-chunk * width // (before * CHUNK))):
            first = (step * before + rank) * CHUNK
            behind += range(first, min(first + CHUNK, chunk * width))
    behind.sort()
    return [{"chunk": chunk, "waiting": behind[rank::world_size]} for rank in range(world_size)]


def _ahead(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches, put together by a thread while those before them are trained on."""
    with ThreadPoolExecutor(1) as thread:
        ready = deque(thread.submit(next, batches, None) for _ in range(AHEAD))
        while (batch := ready.popleft().result()) is not None:
            ready.append(thread.submit(next, batches, None))
            yield batch


def _sizes(waiting: Sequence[Waiting]) -> np.ndarray:
    return np.array([one.size for one in waiting], dtype=np.int64).reshape(-1, 2)


def _as_it_is(found: Found) -> Found:
    return found


def _to_tensors(found: Found) -> Found:
    """Pictures as tensors, which go from one process to another in shared memory."""
    return [({**one, **{name: [torch.tensor(x) for x in one[name]] for name in ARRAYS}}, some) for one, some in found]


def _to_arrays(prepared: Prepared) -> Prepared:
    """Pictures in memory of their own: shared memory is scarce, and they may wait for long."""
    return {**prepared, **{name: [x.numpy().copy() for x in prepared[name]] for name in ARRAYS}}


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return batch
    return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
