"""Which samples each step reads: a pure function of (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

FEISTEL_ROUNDS = 6
# Travels with a batch: where a source that keeps its position goes on behind it
POSITION = "position"


def permuted(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Image of `positions` (int64 in 0..length-1) under this epoch's permutation.

    A Feistel network over the next even power of two; a value outside the range is permuted again
    until it is inside (cycle walking). Needs no memory of the order of `length`.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, dtype=np.uint64)

    def once(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right

    values = once(np.asarray(positions).astype(np.uint64))
    while (outside := values >= length).any():
        values[outside] = once(values[outside])
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class StepBatchSampler(Sampler[list[int]]):
    """One list of `batch_size` indices for each step from `start_step` to `steps` - 1.

    Rank r of step s takes the positions s * batch * world + r * batch + j. With `dataset_length`
    None (endless data) a position is the index itself. Otherwise position p belongs to epoch p //
    length, in which every index comes once, in an order of its own when `shuffle` is set. Raises
    ValueError for settings out of range. It has no length on purpose: the trainer counts steps, and
    a length would shrink with every resume.
    """

    def __init__(
        self,
        batch_size: int,
        steps: int,
        start_step: int = 0,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        dataset_length: int | None = None,
        shuffle: bool = True,
    ) -> None:
        empty = dataset_length is not None and dataset_length < 1
        if batch_size < 1 or not 0 <= rank < world_size or empty:
            raise ValueError(f"{batch_size=}, {rank=}, {world_size=}, {dataset_length=} do not fit together")
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step must be in 0..{steps}, got {start_step}")
        self.batch_size, self.steps, self.start_step = batch_size, steps, start_step
        self.world_size, self.rank, self.seed = world_size, rank, seed
        self.dataset_length, self.shuffle = dataset_length, shuffle

    def __iter__(self) -> Iterator[list[int]]:
        return (self.batch(step) for step in range(self.start_step, self.steps))

    def positions(self, step: int) -> range:
        """The places in the stage's data that a step reads on this rank, each once."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def batch(self, step: int) -> list[int]:
        """The indices of one step on this rank."""
        return self.indices(self.positions(step))

    def with_indices(self, places: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs of index and place."""
        return list(zip(self.indices(places), places, strict=True))

    def indices(self, places: Sequence[int]) -> list[int]:
        """The indices of places in the whole stage's data."""
        positions = np.array(places, dtype=np.int64)
        length = self.dataset_length
        if length is None:
            return positions.tolist()
        indices = positions % length
        if self.shuffle:
            epochs = positions // length
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                indices[here] = permuted(indices[here], length, self.seed, epoch)
        return indices.tolist()


class PlaceSampler(Sampler[list[tuple[int, int]]]):
    """Batches of index and place, without end where the sampler has none.

    Args:
        start: the step of `sampler` to begin with.
        waiting: places that come before those of any step.
    """

    def __init__(self, sampler: StepBatchSampler, start: int, waiting: Sequence[int] = ()) -> None:
        self.sampler, self.start, self.waiting = sampler, start, waiting

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.sampler.batch_size
        for first in range(0, len(self.waiting), size):
            yield self.sampler.with_indices(self.waiting[first : first + size])
        for step in range(self.start, self.sampler.steps):
            yield self.sampler.with_indices(self.sampler.positions(step))
