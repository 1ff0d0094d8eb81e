"""What the sections share, and the header with the key numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from lightning_internvl.report.charts import bar
from lightning_internvl.report.metric_words import about, words
from lightning_internvl.report.metrics_table import format_number, times_chance, with_chance
from lightning_internvl.report.read import RunFiles, StageFiles, numbers

# Kinds of metric that tell most in one number; of each kind a stage shows one before it shows a
# second.
KEYS = (r"(r|recall)[@_]?1$", r"top[@_]?1$", r"acc", r"cider", r"exact", r"validation_loss$")
KEY_METRICS = [re.compile(kind) for kind in KEYS]
# What is no share of anything and has no largest value, so that no bar can show it.
WITHOUT_BAR = re.compile(r"loss|_(samples|answers)$")
TILES_PER_STAGE = 4


def section(name: str, title: str, lead: str, body: str) -> str:
    """One section of the page; empty where `body` is."""
    return f'<section id="{name}"><h2>{title}</h2><p class="lead">{lead}</p>{body}</section>' if body else ""


def html_table(head: Sequence[str], bodies: Sequence[str]) -> str:
    """A table of whole <tbody> elements that scrolls where it is too wide."""
    cells = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>{"".join(bodies)}</table></div>'


def row_group(title: str, columns: int, rows: Iterable[str]) -> str:
    """Rows of a table, a <tbody> of their own under a title over all columns."""
    head = f'<tr><th colspan="{columns}" scope="rowgroup">{escape(title)}</th></tr>'
    return f'<tbody class="group">{head}{"".join(rows)}</tbody>'


def count(number: float) -> str:
    """812345 as "812 k"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def metric_cell(name: str) -> str:
    """The first cell of a metric's row: what it is called, and what it says."""
    said = about(name)
    return f'<th scope="row" title="{escape(name)}">{escape(words(name))}{f"<small>{escape(said)}</small>" if said else ""}</th>'


def minutes(seconds: float) -> str:
    """A time as "40 s" or "3.7 min"."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def tops(run: RunFiles) -> dict[str, float]:
    """Where the bar of each metric ends: at 1, or its largest value or chance level."""
    largest: dict[str, float] = {}
    for stage in run.stages:
        for name, value, chance in with_chance(stage.metrics):
            finite = [number for number in (value, chance) if number is not None and math.isfinite(number)]
            largest[name] = max([largest.get(name, 1.0), *finite])
    return largest


def metric_bar(name: str, value: float, chance: float | None, ends: dict[str, float]) -> str:
    """The bar of a metric; nothing for a loss or a count."""
    return "" if WITHOUT_BAR.search(name) else bar(value, chance, ends[name])


def header(run: RunFiles) -> str:
    """Title, what was trained, and what could not be read."""
    seconds = sum(stage.seconds for stage in run.stages)
    total = f"{run.total_steps:,} steps · {minutes(seconds)}" if run.total_steps else "nothing trained yet"
    damaged = "".join(f"<li><code>{escape(name)}</code></li>" for name in run.damaged)
    note = f'<div class="note">These files could not be read:<ul>{damaged}</ul></div>' if damaged else ""
    return f'<header><h1>Alignment report</h1><p class="recipe"><b>{escape(run.recipe)}</b> · {total}</p>{note}</header>'


def stages(run: RunFiles) -> str:
    """The pipeline as a diagram with each stage's key metrics."""
    ends = tops(run)
    steps = "".join(_pipeline_step(stage, ends) for stage in run.stages)
    body = f'<ol class="pipeline">{steps}</ol>' if steps else ""
    return section("stages", "Stages", "What each stage trained, and its main measures on held-out data.", body)


def _pipeline_step(stage: StageFiles, ends: dict[str, float]) -> str:
    trained = [str(row.get("group")) for row in stage.last_rows if row.get("trained")]
    state, text = "done", f"{stage.steps:,} steps · {minutes(stage.seconds)}"
    if not stage.finished:
        state = "stopped" if stage.steps else "planned"
        text = f"unfinished, step {stage.steps:,} · {minutes(stage.seconds)}" if stage.steps else "not started"
    if stage.summary:
        kept, pairs = (numbers(stage.summary).get(name, 0) for name in ("kept", "pairs"))
        text = f"keeps {kept:,.0f} of {pairs:,.0f} pairs · {minutes(stage.seconds)}"
    trains = f"<small>trains {escape(', '.join(trained))}</small>" if trained else ""
    taken = f"<small>not trained here: taken from <code>{escape(stage.taken_from)}</code></small>" if stage.taken_from else ""
    return f'<li class="{state}"><b>{escape(stage.name)}</b><span>{text}</span>{trains}{taken}{"".join(_tiles(stage, ends))}</li>'


def _tiles(stage: StageFiles, ends: dict[str, float]) -> Iterator[str]:
    for name, value, chance in _key_rows(stage)[:TILES_PER_STAGE]:
        beside = ratio = ""
        if chance is not None:
            ratio = f"<span>chance {format_number(chance)}</span><span>{times_chance(value, chance)}</span>"
            beside = bar(value, chance, ends[name])
        title, number = escape(words(name)), format_number(value)
        yield f'<div class="tile"><span>{title}</span><strong>{number}</strong>{beside}<em>{ratio}</em></div>'


def _key_rows(stage: StageFiles) -> list[tuple[str, float, float | None]]:
    """Metrics of the known kinds by turns, then others whose chance level is known; the rest is
    left to the table."""
    seen: dict[int, int] = {}
    ranked = []
    for row in with_chance(stage.metrics):
        kind = next((index for index, kind in enumerate(KEY_METRICS) if kind.search(row[0].lower())), None)
        if kind is not None:
            ranked.append((False, seen.setdefault(kind, 0), row))
            seen[kind] += 1
        elif row[2] is not None:
            ranked.append((True, 0, row))
    ranked.sort(key=lambda entry: entry[:2])
    return [row for _, _, row in ranked]
