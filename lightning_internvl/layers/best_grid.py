"""Pictures of any size as a grid of squares and the whole picture: which grid, and which visual tokens
are left of it (LLaVA-NeXT, Liu et al. 2024; LLaVA-OneVision, Li et al. 2024, section 3.2; official
`mm_utils.py` and `llava_arch.py`).

Numbers of the host alone: the processor counts tokens with them, and the connector puts tokens
together.

Letters: S side of a square in pixels, G side of its grid of visual tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

Size = tuple[int, int]  # height and width, or rows and columns
ALONE: Size = (0, 0)  # the grid of a picture that is one square, whole
WASTE = 1.1  # so many times too long a side is borne (official `anyres_max`)


def checked_grids(grids: Sequence[Sequence[int]]) -> tuple[Size, ...]:
    """Grids of squares as (rows, columns).

    Raises:
        ValueError: for none, or one that is no grid.
    """
    found = tuple((int(one[0]), int(one[1])) for one in grids if len(one) == 2)
    if not found or len(found) != len(grids) or min(map(min, found)) < 1:
        given = [list(one) for one in grids]
        raise ValueError(f"grids={given} must be one or more pairs of rows and columns of squares, as in [[1, 2], [2, 2]]")
    return found


@functools.lru_cache(maxsize=4096)
def best_grid(height: int, width: int, side: int, grids: tuple[Size, ...]) -> Size:
    """The grid that shows most pixels of a picture; of equals the one with least left over, then the
    first (official `select_best_resolution`).

    Args:
        height, width: of the picture, in pixels.
        side: S.
    """
    best, most, least = grids[0], -1, 0
    for rows, columns in grids:
        scale = min(columns * side / width, rows * side / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        left = rows * columns * side**2 - shown
        if shown > most or (shown == most and left < least):
            best, most, least = (rows, columns), shown, left
    return best


def inner_size(height: int, width: int, target: Size) -> Size:
    """Height and width of a picture when it is resized, in its proportions, to fill `target` one way
    (official `resize_and_pad_image`)."""
    across, down = target[1] / width, target[0] / height
    if across < down:
        return min(math.ceil(height * across), target[0]), target[1]
    return target[0], min(math.ceil(width * down), target[1])


def unpadded(height: int, width: int, grid: Size, side: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the visual tokens of a grid that show the picture and no border
    (official `unpad_image`).

    Args:
        height, width: of the picture, in pixels.
        grid: rows and columns of squares.
        side: G.
    """
    rows, columns = grid[0] * side, grid[1] * side
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
        return top, 0, rows - 2 * top, columns
    left = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, left, rows, columns - 2 * left


def reduced(rows: int, columns: int, side: int, map_squares: int | None) -> Size:
    """Rows and columns of visual tokens after a reduction to about `map_squares` squares of G x G;
    as they are where there are fewer, or without a limit (official `anyres_max_9`)."""
    ratio = math.sqrt(rows * columns / (map_squares * side**2)) if map_squares else 1.0
    return (int(rows // ratio), int(columns // ratio)) if ratio > WASTE else (rows, columns)


def picture_tokens(size: Size, grid: Size, side: int, map_squares: int | None) -> int:
    """Visual tokens of a picture: the whole in one square, then the rows of the grid, with a token
    behind each; a picture that is one square has a token behind it."""
    if tuple(grid) == ALONE:
        return side**2 + 1
    rows, columns = reduced(*unpadded(*size, grid, side)[2:], side, map_squares)
    return side**2 + rows * (columns + 1)


def video_tokens(frames: int, side: int, pool: int) -> int:
    """Visual tokens of a video: each frame's are pooled `pool` x `pool`, and one token is behind the
    last."""
    return frames * math.ceil(side / pool) ** 2 + 1


def square_side(tokens: int) -> int:
    """G of so many visual tokens.

    Raises:
        ValueError: if they are no square grid.
    """
    side = math.isqrt(tokens)
    if side**2 != tokens:
        advice = "tokens before the patches must be left out (middleware.keep_special=false)"
        raise ValueError(f"{tokens} visual tokens of a square are no square grid; {advice}")
    return side
