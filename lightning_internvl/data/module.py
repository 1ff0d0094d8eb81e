"""The training data of one stage: which samples a step reads is a pure function of the step, so
resume costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_internvl.console import console
from lightning_internvl.data.bad_samples import SKIPPED, TRIES, Ledger, Skipped, usable_sample
from lightning_internvl.data.collate.base import ON_HOST, Collator, Prepared
from lightning_internvl.data.collate.embedding import with_batches
from lightning_internvl.data.collate.packing import Grouping
from lightning_internvl.data.files.datasets import FileDataset
from lightning_internvl.data.files.unread import UNREAD, StreamedAccount
from lightning_internvl.data.gradient_accumulation import COUNTS, AccumulationWindows
from lightning_internvl.data.order.sampler import POSITION, PlaceSampler, StepBatchSampler
from lightning_internvl.data.packed_stream import CHUNK, PackedStream, Position, dealt_positions
from lightning_internvl.data.processors.pixels import as_bytes
from lightning_internvl.data.shards.cursor import ReaderLayout
from lightning_internvl.data.shards.datasets import ShardDataset
from lightning_internvl.data.shards.stream import ShardStream
from lightning_internvl.distributed.collectives import data_parallel_rank_and_size, gather_objects
from lightning_internvl.distributed.signals import shield_worker


class StageData(L.LightningDataModule):
    """Batches of one stage.

    Args:
        dataset: map-style, of samples as mappings with a "key"; each gets "draw", (seed, place in
            the stage's data), from which chance in its preparation is drawn. `endless` data is read
            in order, finite data in a new order each epoch. Or shards (see `data.shards.stream`).
        collate: samples to a batch.
        batch_size: samples a step on one device; rows, where samples share them.
        batches: micro-batches of the whole stage on one device.
        start_batch: the first one to read (after a resume).
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        max_bad_fraction: the share of samples that may be unusable, which are skipped and replaced
            (see `data.bad_samples`); 0 stops at the first one.
        max_sample_seconds: the longest time that reading and preparing one sample may take; None: any.
        max_unread_fraction: the share of a stream's records that may hold something that is not
            read.
        folder: where they are listed (`skipped.jsonl`, and `skipped.RANK.jsonl` for further
            processes).
        held_out: samples to measure on, which are never trained on.
        grouping: how samples that wait are put together; None: batches hold samples in the order in
            which they come.
        accumulate: micro-batches of an optimizer step; each then carries the counts of all of them
            (see `data.gradient_accumulation`).
    """

    trainer: L.Trainer  # Lightning sets it before it asks for batches

    def __init__(
        self,
        dataset: Dataset[Any] | ShardDataset,
        collate: Collator,
        *,
        batch_size: int,
        batches: int,
        start_batch: int = 0,
        seed: int = 0,
        endless: bool = True,
        num_workers: int = 0,
        max_bad_fraction: float = 0.0,
        max_sample_seconds: float | None = None,
        max_unread_fraction: float = 1.0,
        folder: Path = Path(),
        held_out: FileDataset | None = None,
        grouping: Grouping | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.dataset, self.collate = dataset, collate
        self.batch_size, self.num_workers = batch_size, num_workers
        self.batches, self.start_batch = batches, start_batch
        self.seed, self.endless = seed, endless
        self.max_bad_fraction, self.folder = max_bad_fraction, Path(folder)
        self.held_out, self.max_sample_seconds = held_out, max_sample_seconds
        self.ledger: Ledger | None = None
        self.account = StreamedAccount(max_unread_fraction)
        self.grouping, self.accumulate = grouping, accumulate
        # What keeps a position of its own; None where the position follows from the step.
        self.source: PackedStream | ShardStream | None = None
        # Behind the last batch that this process has trained on
        self.position: Position | None = None
        self.restored: list[Position] | None = None  # those of all processes, from a checkpoint

    def train_dataloader(self) -> Iterable[Any]:
        """Batches of this rank, from `start_batch` on.

        Raises:
            ValueError: without any data; if a stage that keeps its position goes on from a
                checkpoint that does not say it.
        """
        length, rank = self._length(), self.trainer.global_rank
        if self.held_out is not None and len(self.held_out) == 0:
            self.held_out = None  # of one record, or of equal ones
        source = self.source = self._source(length)
        self.ledger = Ledger(
            self.folder / (f"skipped.{rank}.jsonl" if rank else "skipped.jsonl"),
            max_bad_fraction=self.max_bad_fraction,
            start=self.start_batch,
            batch_size=self.batch_size,
            epoch=length,
            samples_read=None if source is None else source.samples_read,
        )
        self.position = None if source is None else source.position
        batches = self._batches(length) if source is None else source.loader()
        if self.accumulate == 1:
            return batches
        return AccumulationWindows(batches, self.accumulate, self.trainer.lightning_module.counts)

    @property
    def records(self) -> int | None:
        """Records of an epoch; None of data without an end, and of shards."""
        return self._length()

    def first(self, count: int) -> list[Prepared]:
        """The first samples that training on one process would read.

        Raises:
            ValueError: if the data holds none, or one of them cannot be used (and
                `max_bad_fraction` is 0).
        """
        if isinstance(self.dataset, ShardDataset):
            return self._first_of_shards(self.dataset, count)
        length = self._length()
        sampler = StepBatchSampler(count, 1, seed=self.seed, dataset_length=length)
        samples = self._samples(length)
        return [samples[one][0] for one in sampler.with_indices(sampler.positions(0))]

    def every_batch(self) -> Iterator[dict[str, Any]]:
        """Each sample that this stage will read, and what is held out, once, in batches of one row a
        sample: the share of this process. All processes have equally many; what is left over is read
        by several.

        Raises:
            ValueError: for data of which it is not known beforehand.
        """
        rank, size = data_parallel_rank_and_size(self.trainer)
        length = self._length()
        if isinstance(self.dataset, ShardDataset) or (length is None and self.grouping is not None):
            kind = "shards" if isinstance(self.dataset, ShardDataset) else "rows packed from data without an end"
            raise ValueError(
                f"which samples this stage reads is not known beforehand of {kind}; train adapters alone, or give files"
            )
        steps = self.batches * self.batch_size * size
        count = steps if length is None else length if self.grouping else min(steps, length)
        order = StepBatchSampler(count, 1, seed=self.seed, dataset_length=length)
        sources = [(self._samples(length), order.with_indices(range(count)))]
        if self.held_out is not None:
            held_out, apart = self.held_out, len(self.held_out)
            samples = _PreparedSamples(held_out, self.collate, self.seed, apart, TRIES, self.max_sample_seconds)
            sources.append((samples, [(place, place) for place in range(apart)]))
        for samples, places in sources:
            own = [places[place % len(places)] for place in range(rank, -(-len(places) // size) * size, size)]
            groups = [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]
            stack = _Stack(self.collate)
            for batch in DataLoader(samples, batch_sampler=groups, collate_fn=stack, num_workers=self.num_workers):
                del batch[SKIPPED]
                yield batch

    def _first_of_shards(self, data: ShardDataset, count: int) -> list[Prepared]:
        layout = self._layout(data, 1)
        stream = ShardStream(data, self.collate, layout, batches=self.batches, seed=self.seed)
        found, skipped = stream.first(count)
        if skipped and not self.max_bad_fraction:
            raise ValueError(skipped[0].reason)
        return found

    def _length(self) -> int | None:
        if self.endless or isinstance(self.dataset, ShardDataset):
            return None
        length = len(cast(Sized, self.dataset))  # which finite data is
        if length == 0:
            why = "the data holds no record (or all of them are held out)"
            raise ValueError(f"there is nothing to train on: {why}")
        return length

    def _batches(self, length: int | None) -> DataLoader[Any]:
        sampler = self._sampler(self.batch_size, self.batches, self.start_batch, length)
        return DataLoader(
            self._samples(length),
            batch_sampler=PlaceSampler(sampler, self.start_batch),
            collate_fn=_Stack(self.collate),
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def _samples(self, length: int | None) -> _PreparedSamples:
        assert not isinstance(self.dataset, ShardDataset)  # which are read in streams
        tries = TRIES if self.max_bad_fraction else 1
        return _PreparedSamples(self.dataset, self.collate, self.seed, length, tries, self.max_sample_seconds)

    def _sampler(self, batch_size: int, steps: int, start: int, length: int | None) -> StepBatchSampler:
        rank, size = data_parallel_rank_and_size(self.trainer)
        return StepBatchSampler(batch_size, steps, start, size, rank, self.seed, dataset_length=length)

    def _source(self, length: int | None) -> PackedStream | ShardStream | None:
        if isinstance(self.dataset, ShardDataset):
            return self._shard_stream(self.dataset)
        return None if self.grouping is None else self._packed_stream(length, self.grouping)

    def _packed_stream(self, length: int | None, grouping: Grouping) -> PackedStream:
        if self.start_batch and self.restored is None:
            fault = "the checkpoint does not say where its packed data stood"
            raise ValueError(f"{fault}; resume the run that has written it")
        share, shares = data_parallel_rank_and_size(self.trainer)
        positions = dealt_positions(self.restored, shares) if self.restored else None
        return PackedStream(
            self._samples(length),
            self._sampler(CHUNK, sys.maxsize, 0, length),
            grouping,
            batches=self.batches,
            start=self.start_batch,
            position=positions[share] if positions else None,
            num_workers=self.num_workers,
        )

    def _layout(self, data: ShardDataset, world_size: int) -> ReaderLayout:
        return ReaderLayout.for_step(data.lanes, data.turns, self.batch_size * world_size)

    def _shard_stream(self, data: ShardDataset) -> ShardStream:
        share, shares = data_parallel_rank_and_size(self.trainer)
        return ShardStream(
            data,
            self.collate,
            self._layout(data, shares),
            rank=share,
            world_size=shares,
            batches=self.batches,
            start=self.start_batch,
            seed=self.seed,
            restored=self.restored or (),
            grouping=self.grouping,
            num_workers=self.num_workers,
            accumulate=self.accumulate,
            seconds=self.max_sample_seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the data goes on, for a checkpoint: nothing if the step tells; collective."""
        return {} if self.position is None else {"positions": gather_objects(self.position)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the data of a checkpoint stood."""
        self.restored = state_dict["positions"]

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Count what was skipped for a batch, and keep where the data stands behind it.

        It is counted when the batch is trained on, not when it was prepared, so that a resume
        counts none twice.

        Raises:
            ValueError: if too many samples are bad.
        """
        samples_read = None
        if POSITION in batch:
            assert self.source is not None
            assert self.position is not None
            position = batch.pop(POSITION)
            self.position, samples_read = self.source.cursor_after(self.position, position)
        if self.ledger is not None:
            self.ledger.add(batch.pop(SKIPPED, ()), samples_read)
        self._tell(self.account.enter(batch.pop(UNREAD, ())))
        return batch

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> dict[str, Any]:
        """All but what the host reads, and the counts of what it has the labels of until now: a
        step need not ask the device for them. Pictures cross as bytes and become float32 there."""
        moved = with_batches(batch, partial(self._on_device, device=device, place=dataloader_idx))
        return {**moved, COUNTS: self.trainer.lightning_module.counts(batch)}

    def _on_device(self, batch: dict[str, Any], device: torch.device, place: int) -> dict[str, Any]:
        moved = {name: value for name, value in batch.items() if name not in ON_HOST}
        moved = super().transfer_batch_to_device(moved, device, place)
        if (processor := getattr(self.collate, "processor", None)) is not None:
            moved = processor.normalised(moved)
        return {**batch, **moved}

    def teardown(self, stage: str) -> None:
        """Say at the end how many samples were skipped."""
        if self.ledger is not None and (summary := self.ledger.summary()):
            console.print(summary, soft_wrap=True)
        self._tell(self.account.end())

    def _tell(self, line: str | None) -> None:
        """What of a stream's records is not read, by the first of all processes."""
        if line and self.trainer.global_rank == 0:
            console.print(line, soft_wrap=True, markup=False, highlight=False)


class _PreparedSamples(Dataset[tuple[Prepared, list[Skipped]]]):
    """Prepared samples by index and place (of several readings), and what each skipped."""

    def __init__(
        self, dataset: Dataset[Any], collate: Collator, seed: int, length: int | None, tries: int, seconds: float | None
    ) -> None:
        self.dataset, self.collate = dataset, collate
        self.seed, self.length, self.tries, self.seconds = seed, length, tries, seconds

    def __getitem__(self, index_and_place: tuple[int, int]) -> tuple[Prepared, list[Skipped]]:
        index, place = index_and_place
        read, prepare = self.dataset.__getitem__, self.collate.prepare
        seed, length, seconds = self.seed, self.length, self.seconds
        return usable_sample(read, prepare, index, place, seed=seed, length=length, tries=self.tries, seconds=seconds)


class _Stack:
    """Prepared samples to a batch, with all that was skipped for it."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, found: Sequence[tuple[Prepared, list[Skipped]]]) -> dict[str, Any]:
        skipped = [one for _, others in found for one in others]
        with as_bytes():
            batch = self.collate.stack([prepared for prepared, _ in found])
        return {**batch, SKIPPED: skipped}
