"""The training data of one stage: which samples a step reads is a pure function of the step, so resume costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_internvl.data.sampler import StepBatchSampler


class StageData(L.LightningDataModule):
    """Batches of one stage.

    Args:
        dataset: map-style, of samples as mappings; each gets "draw", (seed, place in the stage's data), from which chance in
            its preparation is drawn. `endless` data is read in order, finite data in a new order each epoch.
        collate: samples to a batch.
        batch_size: samples a step on one device.
        batches: micro-batches of the whole stage on one device.
        start_batch: the first one to read (after a resume).
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], dict[str, Any]],
        *,
        batch_size: int,
        batches: int,
        start_batch: int = 0,
        seed: int = 0,
        endless: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.dataset, self.collate, self.batch_size, self.num_workers = dataset, collate, batch_size, num_workers
        self.batches, self.start_batch, self.seed, self.endless = batches, start_batch, seed, endless

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of this rank, from `start_batch` on."""
        sampler = StepBatchSampler(
            self.batch_size,
            self.batches,
            start_step=self.start_batch,
            world_size=self.trainer.world_size,
            rank=self.trainer.global_rank,
            seed=self.seed,
            dataset_length=None if self.endless else len(self.dataset),
        )
        return DataLoader(
            _Drawn(self.dataset, self.seed),
            batch_sampler=_Draws(sampler),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )


class _Draws(Sampler[list[tuple[int, int]]]):
    """The batches of a sampler as pairs of index and place in the stage's data."""

    def __init__(self, sampler: StepBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps = range(self.sampler.start_step, self.sampler.steps)
        return (list(zip(self.sampler.batch(s), self.sampler.positions(s), strict=True)) for s in steps)


class _Drawn(Dataset[dict[str, Any]]):
    """Samples by index and place, which tells two readings of one sample apart."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, drawn: tuple[int, int]) -> dict[str, Any]:
        index, place = drawn
        return {**self.dataset[index], "draw": (self.seed, place)}
