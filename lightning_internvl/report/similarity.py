"""Similarity matrices as heat maps, and retrieval as rows of pictures."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import RunFiles, StageFiles
from lightning_internvl.report.sections import section

Matrix = list[list[float]]
CELL = 44  # side of a heat map's cell, in units of its own box
MAX_QUERIES = 10


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


def similarity_matrices(run: RunFiles, pictures: Pictures) -> str:
    """First and last similarity matrix of each stage that measured one."""
    parts, listed = [], ""
    for stage in run.stages:
        measured = [sample for sample in stage.samples if matrix_of(sample)]
        if not measured:
            continue
        shown = measured if len(measured) == 1 else [measured[0], measured[-1]]
        values = [value for sample in shown for row in matrix_of(sample) for value in row]
        low, high = min(values), max(values)
        figures = [
            _heat_figure(sample, f"{word}: step {sample['step']:,}", (low, high), pictures)
            for word, sample in zip(("Before", "After") if len(shown) == 2 else ("Measured once",), shown, strict=True)
        ]
        parts.append(
            f'<h3>{escape(stage.name)}</h3><div class="pair">{"".join(figures)}</div>'
            f'<p class="scale"><span>{low:.2f}</span><i></i><span>{high:.2f}</span>'
            f" cosine similarity{'; both matrices share the scale' if len(shown) == 2 else ''}</p>"
        )
        # Stages probe with the same pictures, as a rule: their captions are listed once.
        captions = _caption_list(shown[-1])
        parts.append(captions if captions != listed else "")
        listed = captions
    lead = (
        "Each row is a picture, each column a caption; the outlined diagonal holds the right "
        "pairs. The dot marks the caption closest to each picture."
    )
    return section("similarity", "The similarity matrix before and after", lead, "".join(parts))


def _heat_figure(sample: dict[str, Any], title: str, scale: tuple[float, float], pictures: Pictures) -> str:
    matrix = matrix_of(sample)
    low, high = scale
    columns, images = len(matrix[0]), sample.get("images") or []
    parts = [f'<text class="axis" x="{60 + CELL * (j + 0.5)}" y="18">{j + 1}</text>' for j in range(columns)]
    for i, row in enumerate(matrix):
        y = 28 + CELL * i
        if i < len(images):
            placed = f'x="10" y="{y + 1}" width="{CELL - 4}" height="{CELL - 4}"'
            parts.append(pictures.use(images[i], f"picture {i + 1}", placed))
        for j, value in enumerate(row):
            x = 60 + CELL * j
            strength = (value - low) / (high - low) if high > low else 0.5
            kind = "cell right" if i == j else "cell"
            parts.append(
                f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 3}" height="{CELL - 3}" rx="5" '
                f'fill-opacity="{0.04 + 0.96 * strength:.3f}">'
                f"<title>picture {i + 1}, caption {j + 1}: {value:.2f}</title></rect>"
            )
            if j == closest(row):
                parts.append(f'<circle class="closest" cx="{x + CELL / 2 - 1.5}" cy="{y + CELL / 2 - 1.5}" r="5"/>')
    box = f"0 0 {60 + CELL * columns} {28 + CELL * len(matrix)}"
    svg = f'<svg class="heat" viewBox="{box}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption><b>{escape(title)}</b>{_matrix_summary(matrix)}</figcaption>{svg}</figure>"


def _matrix_summary(matrix: Matrix) -> str:
    pairs = range(min(len(matrix), len(matrix[0])))
    right = sum(closest(matrix[i]) == i for i in pairs)
    others = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    margin = sum(matrix[i][i] for i in pairs) / len(pairs) - (sum(others) / len(others) if others else 0.0)
    return (
        f"<span>right caption closest for {right} of {len(pairs)} pictures (by chance 1)</span>"
        f"<span>mean gap to the wrong pairs {margin:.2f}</span>"
    )


def _caption_list(sample: dict[str, Any]) -> str:
    captions = sample.get("captions_true") or []
    items = "".join(f"<li>{escape(str(caption))}</li>" for caption in captions)
    return f'<ol class="captions">{items}</ol>' if items else ""


def retrieval(run: RunFiles, pictures: Pictures) -> str:
    """For each text the pictures ranked first; the last stage open, earlier ones folded."""
    stages = [stage for stage in run.stages if _last_retrieval(stage)]
    parts = []
    for stage in stages:
        queries = _last_retrieval(stage)
        shown = [_query(query, pictures) for query in queries[:MAX_QUERIES]]
        left_out = f"<p>{len(shown)} of {len(queries)} queries shown.</p>" if len(queries) > len(shown) else ""
        opened = " open" if stage is stages[-1] else ""
        parts.append(
            f"<details{opened}><summary>After {escape(stage.name)}</summary>"
            f'<div class="queries">{"".join(shown)}</div>{left_out}</details>'
        )
    lead = "The five pictures closest to each text. The right one is outlined in green and ticked."
    return section("retrieval", "Retrieval", lead, "".join(parts))


def _last_retrieval(stage: StageFiles) -> list[dict[str, Any]]:
    measured = [sample["retrieval"] for sample in stage.samples if isinstance(sample.get("retrieval"), list)]
    return [query for query in measured[-1] if isinstance(query, dict)] if measured else []


def _query(query: dict[str, Any], pictures: Pictures) -> str:
    ranked = query.get("ranked") or []
    items, found = [], "not among these"
    for rank, hit in enumerate(ranked[:5], start=1):
        correct = bool(hit.get("correct"))
        score = f"{float(hit.get('score', math.nan)):.2f}"
        if correct:
            found = f"right one at rank {rank}"
        picture = pictures.use(hit.get("png"), f"rank {rank}, score {score}{', the right one' if correct else ''}")
        kind, tick = (' class="right"', " ✓") if correct else ("", "")
        items.append(f"<li{kind}>{picture}<span>{score}{tick}</span></li>")
    text = escape(str(query.get("text", "")))
    return f'<article class="query"><h4>{text}</h4><p>{found}</p><ol>{"".join(items)}</ol></article>'
