"""Which samples share a row: every sample once, nothing over its budget, rows nearly full, the same each time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lightning_internvl.data.collate.packing import choose_alike, choose_row, plan

IMAGE = 256  # tokens of a tile


def lengths(number: int, longest: int, per_tile: int = IMAGE) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles: log-normal text (32 to half a row) with pictures of 0 to 13 tiles."""
    rng = np.random.default_rng(0)
    tiles = rng.choice([0, 1, 1, 3, 5, 7, 9, 13], number)
    text = np.clip(np.exp(rng.normal(np.log(300), 0.8, number)), 32, longest // 2).astype(np.int64)
    return np.minimum(text + tiles * per_tile, longest), tiles


@pytest.mark.parametrize(
    ("longest", "per_tile", "most"),
    [(4096, IMAGE, None), (4096, IMAGE, 13), (4096, 64, 28), (16384, IMAGE, 48), (16384, 64, 24)],
    ids=["tokens alone", "long pictures, both bind", "both bind", "16k, both bind", "tiles bind"],
)
def test_rows_are_full_within_both_budgets(longest: int, per_tile: int, most: int | None) -> None:
    tokens, tiles = lengths(8000, longest, per_tile)
    rows = plan(tokens, tiles, longest, most)
    assert sorted(place for row in rows for place in row) == list(range(8000))
    sums = np.array([(tokens[row].sum(), tiles[row].sum()) for row in rows])
    assert sums[:, 0].max() <= longest
    fill = sums[:, 0].mean() / longest
    if most is not None:
        assert sums[:, 1].max() <= most
        fill = max(fill, sums[:, 1].mean() / most)
    assert fill >= 0.97
    assert rows == plan(tokens.tolist(), tiles.tolist(), longest, most)


def test_the_plan_takes_time_in_proportion_to_the_samples() -> None:
    tokens, tiles = lengths(24000, 4096)
    seconds = []
    for number in (3000, 24000):
        begun = time.process_time()
        plan(tokens[:number], tiles[:number], 4096, 13)
        seconds.append(time.process_time() - begun)
    assert seconds[1] < 24 * seconds[0]  # 8 if it is linear, 64 if each sample looks at all others


def test_a_row_begins_with_the_oldest_and_is_filled_by_what_leaves_least_room() -> None:
    tokens = np.array([10, 50, 91, 90, 60, 30])
    assert choose_row(tokens, np.zeros_like(tokens), 100) == [0, 3]
    assert choose_row(tokens, np.array([0, 1, 0, 3, 2, 1]), 100, 2) == [0, 4]
    assert choose_row(tokens, np.array([1, 1, 0, 3, 2, 1]), 100, 2) == [0, 1]
    assert choose_row(np.array([100, 1]), np.array([0, 0]), 100) == [0]


def test_neighbours_in_length_with_the_oldest_first() -> None:
    assert choose_alike(np.array([50, 10, 52, 90, 49, 48]), 3) == [0, 2, 4]  # of 48 and 52, which are as near, the older
    assert choose_alike(np.array([50, 10]), 3) == [0, 1]


def test_nothing_and_single_samples() -> None:
    assert plan([], [], 10) == []
    assert plan([10], [2], 10, 2) == [[0]]
    assert plan([6, 6, 6], [0, 0, 0], 10, 4) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("tokens", "tiles", "said"),
    [([5, 11], [0, 0], "sample 1 has 11 tokens, a row has room for 10"), ([5, 5], [0, 3], "sample 1 has 3 tiles, .* for 2")],
)
def test_a_sample_that_no_row_can_hold_is_named(tokens: list[int], tiles: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(tokens, tiles, 10, 2)
    with pytest.raises(ValueError, match="as many tiles as lengths"):
        plan(tokens, tiles[:1], 20, 5)
