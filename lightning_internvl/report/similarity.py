"""Similarity matrices of pictures and captions as one heat map that changes over time."""

from __future__ import annotations

import math
from typing import Any

from lightning_internvl.report.pictures import Pictures

Matrix = list[list[float]]
CELL = 44  # side of a heat map's cell, in units of its own box
LEFT, TOP = 60, 28  # of the first cell


def matrix_of(sample: dict[str, Any]) -> Matrix:
    """A rectangle of finite numbers, or nothing."""
    matrix = sample.get("similarity") or []
    try:
        rows = [[float(value) for value in row] for row in matrix]
    except (TypeError, ValueError):
        return []
    whole = all(len(row) == len(rows[0]) and all(map(math.isfinite, row)) for row in rows)
    return rows if rows and rows[0] and whole else []


def closest(row: list[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)


def strengths(matrix: Matrix, low: float, high: float) -> list[int]:
    """All cells, row by row, in percent of the scale."""
    return [round(100 * (value - low) / (high - low)) if high > low else 50 for row in matrix for value in row]


def heat_map(matrix: Matrix, images: list[Any], scale: tuple[float, float], pictures: Pictures) -> str:
    """A row for each picture, a column for each caption. The right pairs are outlined, and a dot
    marks the caption closest to each picture."""
    columns = len(matrix[0])
    values = iter(strengths(matrix, *scale))
    parts = [f'<text class="axis" x="{LEFT + CELL * (j + 0.5)}" y="18">{j + 1}</text>' for j in range(columns)]
    for i, row in enumerate(matrix):
        y = TOP + CELL * i
        if i < len(images):
            placed = f'x="10" y="{y + 1}" width="{CELL - 4}" height="{CELL - 4}"'
            parts.append(pictures.use(images[i], f"picture {i + 1}", placed))
        for j in range(columns):
            kind = "cell right" if i == j else "cell"
            parts.append(
                f'<rect class="{kind}" x="{LEFT + CELL * j}" y="{y}" width="{CELL - 3}" height="{CELL - 3}" rx="5" '
                f'style="fill-opacity:{opacity(next(values))}"/>'
            )
        middle = f'cx="{LEFT + CELL / 2 - 1.5}" cy="{y + CELL / 2 - 1.5}" r="5"'
        parts.append(f'<circle class="closest" {middle} style="transform:translateX({CELL * closest(row)}px)"/>')
    box = f"0 0 {LEFT + CELL * columns} {TOP + CELL * len(matrix)}"
    label = "similarity of pictures (rows) and captions (columns)"
    return f'<svg class="heat" viewBox="{box}" data-cell="{CELL}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def opacity(strength: int) -> float:
    """Of a cell, so that the weakest is still seen; `page.js` has the same."""
    return round(0.04 + 0.0096 * strength, 3)


def summary(matrix: Matrix) -> str:
    """How far the right pairs stand out."""
    pairs = range(min(len(matrix), len(matrix[0])))
    right = sum(closest(matrix[i]) == i for i in pairs)
    others = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    margin = sum(matrix[i][i] for i in pairs) / len(pairs) - (sum(others) / len(others) if others else 0.0)
    return f"right caption closest for {right} of {len(pairs)} (by chance 1), mean gap to the wrong pairs {margin:.2f}"
