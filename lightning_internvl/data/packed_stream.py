"""Packed rows, or batches of one length, from map-style data, by a window of samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_internvl.data.bad_samples import SKIPPED, Skipped
from lightning_internvl.data.collate.base import Prepared, unchanged
from lightning_internvl.data.collate.packing import Grouping, PackingWindow
from lightning_internvl.data.order.sampler import POSITION, PlaceSampler, StepBatchSampler
from lightning_internvl.data.processors.pixels import as_bytes
from lightning_internvl.distributed.signals import shield_worker

AHEAD = 2  # batches that are put together before they are asked for
CHUNK = 8  # samples that one process prepares at a time
ARRAYS = ("pictures", "videos")

# {"chunk": the next one of this process, "waiting": places of those that were read and not yet
# used}
Position = dict[str, Any]
PreparedChunk = list[tuple[Prepared, list[Skipped]]]


class PackedStream:
    """Batches of one process, chosen from chunks of samples in the sampler's order.

    What a batch holds is a pure function of the seed, the process and the position, whatever
    prepares the samples. A stream that goes on prepares again what was waiting, and nothing before
    it.

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
        self.samples, self.sampler, self.grouping = samples, sampler, grouping
        self.batches, self.start, self.num_workers = batches, start, num_workers
        self.position = position or {"chunk": 0, "waiting": []}

    @property
    def samples_read(self) -> int:
        """Samples that were read before the stream's beginning."""
        return self.position["chunk"] * CHUNK

    def __iter__(self) -> Iterator[dict[str, Any]]:
        chunks = iter(self._chunks(self.position["chunk"], self.position["waiting"]))
        return _ahead(self._batches(chunks)) if self.num_workers else self._batches(chunks)

    @staticmethod
    def cursor_after(before: Position, now: Position) -> tuple[Position, int]:
        """The position behind a batch, and how many samples were read for it."""
        return now, (now["chunk"] - before["chunk"]) * CHUNK

    def loader(self) -> PackedStream:
        """The batches themselves: chunks are prepared by a loader of their own."""
        return self

    def _batches(self, chunks: Iterator[PreparedChunk]) -> Iterator[dict[str, Any]]:
        chunk, places = self.position["chunk"], self.position["waiting"]
        skipped: list[Skipped] = []

        def read() -> Iterator[tuple[int, Prepared]]:
            nonlocal chunk
            found = next(chunks)
            skipped.extend(one for _, others in found for one in others)
            chunk += 1
            return self._with_places(self.sampler.positions(chunk - 1), found)

        window = PackingWindow(self.grouping, read)
        for first in range(0, len(places), CHUNK):  # what was skipped for these is counted already
            window.add(self._with_places(places[first : first + CHUNK], next(chunks)))
        for _ in range(self.start, self.batches):
            groups = window.choose(self.grouping.choices)
            with as_bytes():
                batch = self.grouping.batch(groups)
            position = {"chunk": chunk, "waiting": window.origins}
            yield {**_pinned(batch), SKIPPED: list(skipped), POSITION: position}
            skipped.clear()

    def _chunks(self, chunk: int, places: Sequence[int]) -> DataLoader[Any]:
        return DataLoader(
            self.samples,
            batch_sampler=PlaceSampler(self.sampler, chunk, places),
            collate_fn=_to_tensors if self.num_workers else unchanged,
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            prefetch_factor=2 if self.num_workers else None,
        )

    def _with_places(self, places: Sequence[int], chunk: PreparedChunk) -> Iterator[tuple[int, Prepared]]:
        prepared = [_to_arrays(one) if self.num_workers else one for one, _ in chunk]
        return zip(places, prepared, strict=True)


def dealt_positions(positions: Sequence[Position], world_size: int) -> list[Position]:
    """Positions of another number of processes: samples that waited, and those that only some
    processes had come to, are dealt out, so that none is lost.

    Args:
        positions: of the processes that there were, by their number.
    """
    before, width = len(positions), world_size * CHUNK
    if before == world_size:
        return list(positions)
    front = max(position["chunk"] for position in positions) * before * CHUNK
    chunk = -(-front // width)
    waiting = [place for position in positions for place in position["waiting"]]
    for rank, position in enumerate(positions):
        for step in range(position["chunk"], -(-chunk * width // (before * CHUNK))):
            first = (step * before + rank) * CHUNK
            waiting += range(first, min(first + CHUNK, chunk * width))
    waiting.sort()
    return [{"chunk": chunk, "waiting": waiting[rank::world_size]} for rank in range(world_size)]


def _ahead(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches, put together by a thread while those before them are trained on."""
    with ThreadPoolExecutor(1) as thread:
        ready = deque(thread.submit(next, batches, None) for _ in range(AHEAD))
        while (batch := ready.popleft().result()) is not None:
            ready.append(thread.submit(next, batches, None))
            yield batch


def _to_tensors(chunk: PreparedChunk) -> PreparedChunk:
    """Pictures as tensors, which go from one process to another in shared memory."""
    for prepared, _ in chunk:
        prepared.update({name: [torch.tensor(x) for x in prepared[name]] for name in ARRAYS})
    return chunk


def _to_arrays(prepared: Prepared) -> Prepared:
    """Pictures in memory of their own: shared memory is scarce, and they may wait for long."""
    return {**prepared, **{name: [x.numpy().copy() for x in prepared[name]] for name in ARRAYS}}


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return batch
    return {name: x.pin_memory() if isinstance(x, Tensor) else x for name, x in batch.items()}
