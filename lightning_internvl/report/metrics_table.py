"""Metrics as a table: each value beside the level that chance would reach."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

SCORED, ASKED, TOTAL = "samples", "samples_asked", "samples_total"

CHANCE_SUFFIX = "_chance"


def with_chance(metrics: dict[str, float]) -> list[tuple[str, float, float | None]]:
    """Pair each metric with its chance level: rows of (name, value, chance or None), in the order given.

    "<metric>_chance" is a row of its own only where there is no "<metric>".
    """
    return [
        (name, value, metrics.get(name + CHANCE_SUFFIX))
        for name, value in metrics.items()
        if not (name.endswith(CHANCE_SUFFIX) and name.removesuffix(CHANCE_SUFFIX) in metrics)
    ]


def format_number(value: float) -> str:
    """At most three significant digits below 1, few decimals above: 0.463, 3.14, 12.5, 1,024, 3e-5."""
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


def metrics_table(metrics: dict[str, dict[str, float]]) -> Table:
    """One table over all stages, rows grouped by stage: metric, value, chance, times chance.

    Args:
        metrics: the content of a run's metrics.json, {stage: {metric: value, "<metric>_chance": value}}.
    """
    table = Table(title="Metrics")
    table.add_column("stage")
    table.add_column("metric")
    for column in ("value", "chance", "times chance"):
        table.add_column(column, justify="right")
    for stage, of_stage in metrics.items():
        for row, (name, value, chance) in enumerate(with_chance(of_stage)):
            # Text, not str: a bracket in a name is no markup.
            table.add_row(
                Text(stage if row == 0 else ""),
                Text(name),
                format_number(value),
                "" if chance is None else format_number(chance),
                times_chance(value, chance),
            )
        table.add_section()
    return table


def scored_of(metrics: Mapping[str, float]) -> str:
    """ "500"; "498 of 500" where samples could not be scored; "100 of 500" where fewer were asked for than the set has; both as
    "98 of 100 of 500"; "" for a task that does not say."""
    counts = [metrics[name] for name in (SCORED, ASKED, TOTAL) if name in metrics]
    return " of ".join(f"{count:,.0f}" for count in sorted(set(counts)))


def values_of(metrics: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """Rows of (name, value, chance or None), without the counts of samples."""
    return with_chance({name: value for name, value in metrics.items() if name not in (SCORED, ASKED, TOTAL)})


def results_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """One table over all tasks: metric, value, chance, times chance, samples."""
    table = Table(title="Results")
    table.add_column("task")
    table.add_column("metric")
    for column in ("value", "chance", "times chance", "samples"):
        table.add_column(column, justify="right")
    for task, found in metrics.items():
        for row, (name, value, chance) in enumerate(values_of(found)):
            table.add_row(
                Text(task if row == 0 else ""),  # Text, not str: a bracket in a name is no markup
                Text(name),
                format_number(value),
                "" if chance is None else format_number(chance),
                times_chance(value, chance),
                scored_of(found) if row == 0 else "",
            )
        table.add_section()
    return table
