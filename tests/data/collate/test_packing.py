"""Which samples share a row: every sample once, nothing over its budget, rows nearly full, the same each time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lightning_internvl.data.collate.packing import WINDOW_ROWS, PackingWindow, choose_alike, choose_row, is_enough

IMAGE = 256  # tokens of a tile


def lengths(number: int, longest: int, per_tile: int = IMAGE) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles: log-normal text (32 to half a row) with pictures of 0 to 13 tiles."""
    rng = np.random.default_rng(0)
    tiles = rng.choice([0, 1, 1, 3, 5, 7, 9, 13], number)
    text = np.clip(np.exp(rng.normal(np.log(300), 0.8, number)), 32, longest // 2).astype(np.int64)
    return np.minimum(text + tiles * per_tile, longest), tiles


class Lengths:
    """A grouping of samples that are nothing but their numbers of tokens and tiles."""

    choices = 1

    def __init__(self, longest: int, most: int | None) -> None:
        self.longest, self.most, self.ended = longest, most, False

    def size(self, prepared: dict[str, Any]) -> tuple[int, int]:
        return prepared["tokens"], prepared["tiles"]

    def enough(self, sizes_N2: np.ndarray) -> bool:
        tokens, tiles = sizes_N2.sum(axis=0).tolist()
        return self.ended or is_enough(tokens, tiles, self.longest, self.most, WINDOW_ROWS)

    def choose(self, sizes_N2: np.ndarray) -> list[int]:
        return choose_row(sizes_N2[:, 0], sizes_N2[:, 1], self.longest, self.most)


def pack_all(tokens: np.ndarray, tiles: np.ndarray, longest: int, most: int | None) -> list[list[int]]:
    """All samples in rows; behind the last one, those that still wait are packed too."""
    grouping, rows = Lengths(longest, most), []
    samples = ({"place": n, "tokens": x, "tiles": y} for n, (x, y) in enumerate(zip(tokens, tiles, strict=True)))

    def read() -> Iterator[tuple[int, dict[str, Any]]]:
        for sample in samples:
            yield sample["place"], sample
            return
        grouping.ended = True

    window = PackingWindow(grouping, read)
    while window.waiting or not grouping.ended:
        (row,) = window.choose(1)
        rows.append([sample["place"] for sample in row])
    return rows


@pytest.mark.parametrize(
    ("longest", "per_tile", "most"),
    [(4096, IMAGE, None), (4096, IMAGE, 13), (4096, 64, 28), (16384, IMAGE, 48), (16384, 64, 24)],
    ids=["tokens alone", "long pictures, both bind", "both bind", "16k, both bind", "tiles bind"],
)
def test_rows_are_full_within_both_budgets(longest: int, per_tile: int, most: int | None) -> None:
    tokens, tiles = lengths(8000, longest, per_tile)
    rows = pack_all(tokens, tiles, longest, most)
    assert sorted(place for row in rows for place in row) == list(range(8000))
    sums = np.array([(tokens[row].sum(), tiles[row].sum()) for row in rows])
    assert sums[:, 0].max() <= longest
    fill = sums[:, 0].mean() / longest
    if most is not None:
        assert sums[:, 1].max() <= most
        fill = max(fill, sums[:, 1].mean() / most)
    assert fill >= 0.97
    assert rows == pack_all(tokens, tiles, longest, most)


def test_packing_takes_time_in_proportion_to_the_samples() -> None:
    tokens, tiles = lengths(24000, 4096)
    seconds = []
    for number in (3000, 24000):
        begun = time.process_time()
        pack_all(tokens[:number], tiles[:number], 4096, 13)
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
