"""The training data of one stage: which samples a step reads is a pure function of the step, so resume costs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_internvl.console import console
from lightning_internvl.data.collation import Collator, Prepared
from lightning_internvl.data.ledger import TRIES, Ledger, Skipped, usable
from lightning_internvl.data.sampler import StepBatchSampler

SKIPPED = "skipped"  # what travels with a batch from the process that prepared it to the ledger


class StageData(L.LightningDataModule):
    """Batches of one stage.

    Args:
        dataset: map-style, of samples as mappings with a "key"; each gets "draw", (seed, place in the stage's data), from which
            chance in its preparation is drawn. `endless` data is read in order, finite data in a new order each epoch.
        collate: samples to a batch.
        batch_size: samples a step on one device.
        batches: micro-batches of the whole stage on one device.
        start_batch: the first one to read (after a resume).
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        max_bad_fraction: samples that cannot be used are skipped and replaced up to this share (see `data.ledger`); 0 stops at
            the first one.
        folder: where they are listed (`skipped.jsonl`, and `skipped.RANK.jsonl` for further processes).
        held_out: samples to measure on, which are never trained on.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Collator,
        *,
        batch_size: int,
        batches: int,
        start_batch: int = 0,
        seed: int = 0,
        endless: bool = True,
        num_workers: int = 0,
        max_bad_fraction: float = 0.0,
        folder: Path = Path(),
        held_out: Dataset[Any] | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.collate, self.batch_size, self.num_workers = dataset, collate, batch_size, num_workers
        self.batches, self.start_batch, self.seed, self.endless = batches, start_batch, seed, endless
        self.max_bad_fraction, self.folder = max_bad_fraction, Path(folder)
        self.held_out, self.ledger = held_out, None

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of this rank, from `start_batch` on."""
        length, rank = None if self.endless else len(self.dataset), self.trainer.global_rank
        if length == 0:
            raise ValueError("there is nothing to train on: the data holds no record (or all of them are held out)")
        if self.held_out is not None and len(self.held_out) == 0:
            raise ValueError("data.validation holds no record out; give a larger share, or a file")
        sampler = StepBatchSampler(
            self.batch_size,
            self.batches,
            start_step=self.start_batch,
            world_size=self.trainer.world_size,
            rank=rank,
            seed=self.seed,
            dataset_length=length,
        )
        self.ledger = Ledger(
            self.folder / (f"skipped.{rank}.jsonl" if rank else "skipped.jsonl"),
            max_bad_fraction=self.max_bad_fraction,
            start=self.start_batch,
            batch_size=self.batch_size,
            epoch=length,
        )
        tries = TRIES if self.max_bad_fraction else 1
        return DataLoader(
            _Usable(self.dataset, self.collate, self.seed, length, tries),
            batch_sampler=_Draws(sampler),
            collate_fn=_Stacked(self.collate),
            num_workers=self.num_workers,
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Enter what was skipped for a batch when it is its turn, not when it was prepared, so that a resume counts none twice.

        Raises:
            ValueError: if too many samples are bad.
        """
        if self.ledger is not None:
            self.ledger.add(batch.pop(SKIPPED, ()))
        return batch

    def teardown(self, stage: str) -> None:
        """Say at the end how many samples were skipped."""
        if self.ledger is not None and (told := self.ledger.summary()):
            console.print(told, soft_wrap=True)


class _Draws(Sampler[list[tuple[int, int]]]):
    """The batches of a sampler as pairs of index and place in the stage's data."""

    def __init__(self, sampler: StepBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps = range(self.sampler.start_step, self.sampler.steps)
        return (list(zip(self.sampler.batch(s), self.sampler.positions(s), strict=True)) for s in steps)


class _Usable(Dataset[tuple[Prepared, list[Skipped]]]):
    """Prepared samples by index and place, which tells two readings of one sample apart, and what was skipped for each."""

    def __init__(self, dataset: Dataset[Any], collate: Collator, seed: int, length: int | None, tries: int) -> None:
        self.dataset, self.collate = dataset, collate
        self.seed, self.length, self.tries = seed, length, tries

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[Prepared, list[Skipped]]:
        index, place = drawn
        read, prepare = self.dataset.__getitem__, self.collate.prepare
        return usable(read, prepare, index, place, seed=self.seed, length=self.length, tries=self.tries)


class _Stacked:
    """Prepared samples to a batch, with all that was skipped for it."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, found: Sequence[tuple[Prepared, list[Skipped]]]) -> dict[str, Any]:
        skipped = [one for _, some in found for one in some]
        return {**self.collate.stack([prepared for prepared, _ in found]), SKIPPED: skipped}
