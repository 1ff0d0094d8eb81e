"""Metrics as a table: each value beside the level that chance would reach."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from lightning_internvl.report.metric_words import words

SCORED, ASKED, TOTAL = "samples", "samples_asked", "samples_total"

CHANCE_SUFFIX = "_chance"


def with_chance(metrics: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """Pair each metric with its chance level: rows of (name, value, chance or None).

    "<metric>_chance" is a row of its own only where there is no "<metric>".
    """
    return [
        (name, value, metrics.get(name + CHANCE_SUFFIX))
        for name, value in metrics.items()
        if not (name.endswith(CHANCE_SUFFIX) and name.removesuffix(CHANCE_SUFFIX) in metrics)
    ]


def format_number(value: float) -> str:
    """At most three digits below 1, few decimals above: 0.463, 3.14, 12.5, 1,024, 3e-5."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    if size >= 1e-3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def times_chance(value: float, chance: float | None) -> str:
    """How often `value` holds its chance level ("3.2x", "230x"); empty where that says nothing."""
    if chance is None or chance <= 0 or not math.isfinite(value / chance):
        return ""
    ratio = value / chance
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:,.0f}×"


def scored_of(metrics: Mapping[str, float]) -> str:
    """ "500"; "498 of 500" where samples could not be scored; "100 of 500" where fewer were asked
    for than the set has; both as "98 of 100 of 500"; "" for a task that does not say."""
    counts = [metrics[name] for name in (SCORED, ASKED, TOTAL) if name in metrics]
    return " of ".join(f"{count:,.0f}" for count in sorted(set(counts)))


def values_of(metrics: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """Rows of (name, value, chance or None), without the counts of samples."""
    return with_chance({name: value for name, value in metrics.items() if name not in (SCORED, ASKED, TOTAL)})


def metrics_table(
    metrics: Mapping[str, Mapping[str, float]], *, title: str = "Metrics", group: str = "stage", samples: bool = False
) -> Table:
    """One table, rows grouped by stage or task: metric in words, value, chance, times chance.

    Args:
        metrics: the content of a metrics.json, {stage: {metric: value, "<metric>_chance": value}}.
        group: the title of the first column.
        samples: whether a column says how many samples were scored.
    """
    table = Table(title=title)
    table.add_column(group)
    table.add_column("metric")
    for column in ("value", "chance", "times chance", *(["samples"] if samples else [])):
        table.add_column(column, justify="right")
    for name_of_group, found in metrics.items():
        firsts = [name_of_group, scored_of(found)]
        for name, value, chance in values_of(found) if samples else with_chance(found):
            cells = [format_number(value), "" if chance is None else format_number(chance), times_chance(value, chance)]
            first, count = firsts
            # Text, not str: a bracket in a name is no markup.
            table.add_row(Text(first), Text(words(name)), *cells, *([count] if samples else []))
            firsts = ["", ""]
        table.add_section()
    return table
