"""What was measured as a table: each value beside chance, and over how many of the samples that were asked for."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from lightning_internvl.evaluation.tables import format_number, times_chance, with_chance

SCORED, ASKED, TOTAL = "samples", "samples_asked", "samples_total"


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
