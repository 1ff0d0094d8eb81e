"""The packer alone: how full rows are, how even the work of processes is, and how long a plan takes.

python benchmarks/packing.py                         # 1,000,000 samples for each case, on one core
python benchmarks/packing.py samples=100000

Text is log-normal (median 300 tokens, sigma 0.8, 32 to half a row), pictures have 0 to 13 tiles. `fill` is that of the budget
that binds; `in_order` that of rows that are closed by the first sample that does not fit, as they come. `imbalance` is by how
much the fullest of eight processes at one step is above their mean. Samples of 24 rows wait, as in training.
`core_seconds` are those of one processor, which other programs do not lengthen. Prints one JSON line.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from alternating import arguments, report

from lightning_internvl.data.collate.packing import WINDOW_ROWS, choose_row

PROCESSES = 8
CASES: dict[str, dict[str, int | None]] = {  # tokens of a row, tokens of a tile, tiles of a row
    "4k, text alone": {"tokens": 4096, "tile": 0, "tiles": None},
    "4k, 256 a tile, one budget": {"tokens": 4096, "tile": 256, "tiles": None},
    "4k, 256 a tile, both bind": {"tokens": 4096, "tile": 256, "tiles": 13},
    "4k, 64 a tile, both bind": {"tokens": 4096, "tile": 64, "tiles": 28},
    "16k, 256 a tile, both bind": {"tokens": 16384, "tile": 256, "tiles": 48},
    "16k, 64 a tile, tiles bind": {"tokens": 16384, "tile": 64, "tiles": 24},
}


def lengths(number: int, tokens: int, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles of samples."""
    rng = np.random.default_rng(0)
    tiles = rng.choice([0, 1, 1, 3, 5, 7, 9, 13], number) if tile else np.zeros(number, dtype=np.int64)
    text = np.clip(np.exp(rng.normal(np.log(300), 0.8, number)), 32, tokens // 2).astype(np.int64)
    return np.minimum(text + tiles * tile, tokens), tiles


def pack_all(tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int | None, window: int) -> list[list[int]]:
    """All samples in rows, as training packs them in this order: a list of sample numbers for each row.

    As many samples wait as in `PackingWindow`, counted by running sums, so that a million take seconds.
    """
    sums = [np.cumsum(tokens)] + ([] if max_tiles is None else [np.cumsum(tiles)])
    full = [window * max_tokens, window * (max_tiles or 0)]
    waiting, packed = np.empty(0, dtype=np.int64), np.zeros(2, dtype=np.int64)
    read, rows = 0, list[list[int]]()
    while read < len(tokens) or len(waiting):
        # Counted from the start, as many are read as were packed and fill the window.
        ends = (np.searchsorted(up, done + more) for up, done, more in zip(sums, packed, full, strict=False))
        upto = min(max(1 + int(min(ends)), read), len(tokens))
        waiting, read = np.concatenate([waiting, np.arange(read, upto)]), upto
        row = choose_row(tokens[waiting], tiles[waiting], max_tokens, max_tiles)
        chosen = waiting[row]
        packed += (tokens[chosen].sum(), tiles[chosen].sum())
        waiting = np.delete(waiting, row)
        rows.append(chosen.tolist())
    return rows


def in_order(tokens: np.ndarray, tiles: np.ndarray, most: int, most_tiles: int | None) -> int:
    """Rows of samples as they come."""
    rows, room, tile_room = 0, -1, -1
    for length, squares in zip(tokens.tolist(), tiles.tolist(), strict=True):
        if length > room or (most_tiles is not None and squares > tile_room):
            rows, room, tile_room = rows + 1, most, most_tiles or 0
        room, tile_room = room - length, tile_room - squares
    return rows


def imbalance(sums: np.ndarray) -> float:
    """Mean over steps of (fullest process - mean) / mean."""
    steps = sums[: len(sums) // PROCESSES * PROCESSES].reshape(-1, PROCESSES)
    means = steps.mean(axis=1)
    return float(((steps.max(axis=1) - means) / np.maximum(means, 1e-9)).mean())


def measure(number: int, case: dict[str, Any], window: int) -> dict[str, float]:
    """One case with one window."""
    tokens, tiles = lengths(number, case["tokens"], case["tile"])
    begun = time.process_time()
    rows = pack_all(tokens, tiles, case["tokens"], case["tiles"], window)
    seconds = time.process_time() - begun
    sums = np.array([(tokens[row].sum(), tiles[row].sum()) for row in rows])
    least = max(tokens.sum() / case["tokens"], tiles.sum() / case["tiles"] if case["tiles"] else 0)  # rows, were all full
    found = {
        "fill": least / len(rows),
        "in_order": least / in_order(tokens, tiles, case["tokens"], case["tiles"]),
        "token_imbalance": imbalance(sums[:, 0]),
        "samples_a_row": number / len(rows),
        "core_seconds_per_million": seconds * 1e6 / number,
    }
    if case["tile"]:
        found["tile_imbalance"] = imbalance(sums[:, 1])
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Measure all cases with the window of training."""
    options = arguments(samples=1_000_000)
    results = {name: measure(options["samples"], case, WINDOW_ROWS) for name, case in CASES.items()}
    report("packing", {"numpy": np.__version__}, {"samples": options["samples"], "cases": results})


if __name__ == "__main__":
    main()
