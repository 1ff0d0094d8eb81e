"""Which samples share a row: rows are filled from a window of waiting samples, within budgets of tokens and of image tiles.

A row begins with the sample that has waited longest, so that none waits for ever; then comes, again and again, the one that
leaves the least room of both kinds. All costs depend on the window, none on the data set.

Letters: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PACKED = "packed"  # of `checks.PACKINGS`
WINDOW = 24  # rows' worth of samples that wait; more fill rows better and cost memory
TAKEN = np.iinfo(np.int64).max


def choose_row(tokens_N: np.ndarray, tiles_N: np.ndarray, max_tokens: int, max_tiles: int | None = None) -> list[int]:
    """Places of the waiting samples that make the next row: first the oldest, at place 0, then what fills it up best.

    Args:
        tokens_N, tiles_N: int64, of the waiting samples, the oldest first; each of them fits into a row.
        max_tiles: None: tokens alone decide.
    """
    room, tile_room = max_tokens - tokens_N[0], 0 if max_tiles is None else max_tiles - tiles_N[0]
    tokens, tiles = tokens_N.copy(), np.zeros_like(tiles_N) if max_tiles is None else tiles_N
    tokens[0] = TAKEN
    row, places = [0], np.arange(len(tokens))
    while True:
        places = places[(tokens[places] <= room) & (tiles[places] <= tile_room)]  # rooms only shrink
        if len(places) == 0:
            return row
        left = ((room - tokens[places]) / max_tokens) ** 2 + ((tile_room - tiles[places]) / (max_tiles or 1)) ** 2
        best = int(places[left.argmin()])  # of equals the oldest
        room, tile_room = room - tokens[best], tile_room - tiles[best]
        tokens[best] = TAKEN
        row.append(best)


def choose_alike(tokens_N: np.ndarray, count: int) -> list[int]:
    """Places of the oldest waiting sample and of the `count` - 1 nearest to it in length, in the order in which they wait."""
    return sorted(np.argsort(np.abs(tokens_N - tokens_N[0]), kind="stable")[:count].tolist())


def is_enough(tokens: int, tiles: int, max_tokens: int, max_tiles: int | None, window: int) -> bool:
    """Whether waiting samples of so many tokens and tiles could fill `window` rows."""
    return tokens >= window * max_tokens or (max_tiles is not None and tiles >= window * max_tiles)


def plan(
    lengths: Sequence[int] | np.ndarray,
    tiles: Sequence[int] | np.ndarray,
    max_tokens: int,
    max_tiles: int | None = None,
    window: int = WINDOW,
) -> list[list[int]]:
    """All samples in rows, as training would pack them in this order: a list of sample numbers for each row.

    Args:
        lengths, tiles: of each sample.
        max_tokens, max_tiles: of a row; max_tiles None: any number.
        window: rows' worth of samples to choose from.

    Raises:
        ValueError: for a sample that no row can hold, naming it.
    """
    tokens_N, tiles_N = np.asarray(lengths, dtype=np.int64), np.asarray(tiles, dtype=np.int64)
    if tokens_N.ndim != 1 or tokens_N.shape != tiles_N.shape or window < 1:
        raise ValueError(f"a plan needs as many tiles as lengths, and {window=} of 1 or more: {len(tokens_N)}, {len(tiles_N)}")
    for what, found, most in (("tokens", tokens_N, max_tokens), ("tiles", tiles_N, max_tiles)):
        if most is not None and len(found) and found.max() > most:
            worst = int(found.argmax())
            raise ValueError(f"sample {worst} has {found[worst]} {what}, a row has room for {most}")
    sums = [np.cumsum(tokens_N)] + ([] if max_tiles is None else [np.cumsum(tiles_N)])
    full = [window * max_tokens, window * (max_tiles or 0)]
    waiting, packed, drawn, rows = np.empty(0, dtype=np.int64), np.zeros(2, dtype=np.int64), 0, list[list[int]]()
    while drawn < len(tokens_N) or len(waiting):
        # Counted from the start, as many are drawn as were packed and fill the window.
        upto = 1 + min(int(np.searchsorted(up, done + more)) for up, done, more in zip(sums, packed, full, strict=False))
        upto = min(max(upto, drawn), len(tokens_N))
        waiting, drawn = np.concatenate([waiting, np.arange(drawn, upto)]), upto
        row = choose_row(tokens_N[waiting], tiles_N[waiting], max_tokens, max_tiles)
        chosen = waiting[row]
        packed += (tokens_N[chosen].sum(), tiles_N[chosen].sum())
        waiting = np.delete(waiting, row)
        rows.append(chosen.tolist())
    return rows
