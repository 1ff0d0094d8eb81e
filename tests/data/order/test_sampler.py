"""The step sampler: a pure function of seed, step and rank."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_internvl.data.order.sampler import StepBatchSampler, permuted


@pytest.mark.parametrize("length", [None, 10, 97, 2**33])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_is_the_tail(length: int | None, shuffle: bool) -> None:
    settings = {"batch_size": 7, "steps": 30, "world_size": 2, "rank": 1, "seed": 5, "dataset_length": length}
    whole = list(StepBatchSampler(**settings, shuffle=shuffle))
    for start in (0, 13, 30):
        sampler = StepBatchSampler(**settings, shuffle=shuffle, start_step=start)
        assert list(sampler) == whole[start:]
        assert len(list(sampler)) == 30 - start


def test_endless_index_is_the_position() -> None:
    assert StepBatchSampler(3, 10, world_size=2, rank=1).batch(4) == [27, 28, 29]


def test_ranks_are_disjoint_and_make_up_the_single_process() -> None:
    alone = [sorted(batch) for batch in StepBatchSampler(8, 5, seed=1, dataset_length=101)]
    ranks = [list(StepBatchSampler(4, 5, world_size=2, rank=rank, seed=1, dataset_length=101)) for rank in (0, 1)]
    assert alone == [sorted(a + b) for a, b in zip(*ranks, strict=True)]
    drawn = [index for rank in ranks for batch in rank for index in batch]
    assert len(set(drawn)) == len(drawn) == 40


def test_every_epoch_covers_all_in_its_own_order() -> None:
    drawn = [i for batch in StepBatchSampler(5, 60, seed=3, dataset_length=100) for i in batch]
    epochs = [drawn[start : start + 100] for start in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(100))
    other_seed = [i for batch in StepBatchSampler(5, 20, seed=4, dataset_length=100) for i in batch]
    assert other_seed != epochs[0]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permutation(length: int) -> None:
    values = permuted(np.arange(length), length, seed=0, epoch=0)
    assert sorted(values.tolist()) == list(range(length))
    if length >= 1000:
        assert abs(np.corrcoef(values, np.arange(length))[0, 1]) < 0.1


def test_huge_data_needs_no_memory() -> None:
    indices = StepBatchSampler(1000, 10**9, 10**9 - 1, seed=0, dataset_length=10**12).batch(10**9 - 1)
    assert len(set(indices)) == 1000
    assert 0.4 < np.mean(indices) / 10**12 < 0.6


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"dataset_length": 0}, {"start_step": 11}, {"start_step": -1}],
)
def test_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"fit together|start_step"):
        StepBatchSampler(**{"batch_size": 4, "steps": 10, **settings})
