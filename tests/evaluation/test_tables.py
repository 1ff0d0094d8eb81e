"""The metrics table: chance beside its metric, never as a row of its own."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from lightning_internvl.report.metrics_table import format_number, metrics_table, times_chance, with_chance

METRICS = {
    "contrastive": {"R@1": 0.46, "R@1_chance": 0.002, "margin[mean]": 0.31},
    "supervised": {"accuracy": 0.75, "accuracy_chance": 0.25, "cider": 3.2},
}


def test_table_has_one_row_per_metric_with_chance_beside_it() -> None:
    table = metrics_table(METRICS)
    assert table.row_count == 4
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    lines = [line for line in console.export_text().splitlines() if "0." in line or "3." in line]
    words = [[word for word in line.split() if word not in "│┃║|"] for line in lines]
    assert words == [
        ["contrastive", "R@1", "0.46", "0.002", "230×"],
        ["margin[mean]", "0.31"],
        ["supervised", "answers,", "accuracy", "0.75", "0.25", "3.0×"],
        ["cider", "3.20"],
    ]


def test_stages_are_separated() -> None:
    assert [row.end_section for row in metrics_table(METRICS).rows] == [False, True, False, True]


def test_chance_without_a_metric_is_a_row() -> None:
    assert with_chance({"a_chance": 0.5, "b": 1.0, "b_chance": 0.1}) == [("a_chance", 0.5, None), ("b", 1.0, 0.1)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.0, "1"),
        (0.46312, "0.463"),
        (0.002, "0.002"),
        (3e-5, "3e-5"),
        (-0.25, "-0.25"),
        (3.14159, "3.14"),
        (12.53, "12.5"),
        (1024.4, "1,024"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_few_decimals(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "chance", "text"),
    [(0.5, None, ""), (0.5, 0.0, ""), (math.nan, 0.5, ""), (0.5, 0.25, "2.0×"), (0.46, 0.002, "230×")],
)
def test_times_chance(value: float, chance: float | None, text: str) -> None:
    assert times_chance(value, chance) == text
