"""The arithmetic under the charts."""

from __future__ import annotations

import pytest

from lightning_internvl.report.charts import Series, smooth, thin, ticks, value_range


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 7.3, [0, 2, 4, 6, 8]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (0, 3e-4, None)],
)
def test_ticks_are_round_and_enclose_the_range(low: float, high: float, expected: list[float] | None) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high * (1 - 1e-9)
    assert 3 <= len(marks) <= 7
    if expected is not None:
        assert marks == pytest.approx(expected)


def test_smooth_keeps_a_straight_line_to_its_ends() -> None:
    line = [(step, 2.0 * step + 1) for step in range(100)]
    assert [value for _, value in smooth(line)] == pytest.approx([value for _, value in line])


def test_smooth_reduces_noise_and_stays_in_the_range() -> None:
    line = [(step, float(step % 2)) for step in range(200)]
    assert all(0.3 < value < 0.7 for _, value in smooth(line)[10:-10])
    step_up = [(step, float(step >= 50)) for step in range(100)]
    assert all(0 <= value <= 1 for _, value in smooth(step_up))


def test_smooth_leaves_few_points_alone() -> None:
    line = [(0, 5.0), (10, 1.0)]
    assert smooth(line) == line


def test_thin_keeps_both_ends() -> None:
    thinned = thin(range(1000), 7)
    assert len(thinned) == 7
    assert (thinned[0], thinned[-1]) == (0, 999)
    assert thin([1, 2], 7) == [1, 2]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 5.0], (0.0, 5.0)),
        ([4.9, 5.0], (4.9, 5.0)),
        ([3.0], (0.0, 3.0)),
        ([0.0], (0.0, 1.0)),
        ([-2.0], (-2.0, 0.0)),
    ],
)
def test_range_starts_at_zero_unless_that_wastes_the_chart(values: list[float], expected: tuple[float, float]) -> None:
    line = list(enumerate(values))
    assert value_range([Series("x", "c-0", [line, []])]) == expected
