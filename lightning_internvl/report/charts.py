"""Small SVG charts that need no library.

The x axis of a step chart is in percent of the page's width and its y axis in pixels, so that the
text keeps its size on any screen; only the curves themselves are stretched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

from lightning_internvl.report.metrics_table import format_number

Line = list[tuple[int, float]]
Span = tuple[int, int, float, str]  # first step, last step, trained share from 0 to 1, explanation
MAX_POINTS = 240  # per series and stage: more than the pixels that it gets
SPARSE = 20  # fewer points than this are drawn as dots and not smoothed


@dataclass(frozen=True)
class Series:
    """One measured quantity: a line of (step over the whole run, value) per stage. `chance` is its
    level for each stage that has a line; without any, none is known."""

    label: str
    colour: str
    lines: list[Line]
    dotted: bool = False
    chance: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Axis:
    """The steps of a run, with the (name, first step, last step) of each stage."""

    total: int
    stages: list[tuple[str, int, int]]

    def percent(self, step: float) -> str:
        return f"{100 * step / max(1, self.total):.3f}%"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-12, abs(high) * 1e-9)
    magnitude = 10 ** math.floor(math.log10(span / about))
    unit = next(factor for factor in (1, 2, 2.5, 5, 10) if factor * magnitude * about >= span * 0.999) * magnitude
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [index * unit for index in range(first, last + 1)]


def thin(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` items, evenly spread, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]


def smooth(line: Line) -> Line:
    """A straight line fitted around each point: no lag, no bias at the ends of a stage. Leaves
    short lines alone."""
    if len(line) < SPARSE:
        return line
    sums = [0.0, *accumulate(value for _, value in line)]
    moments = [0.0, *accumulate(index * value for index, (_, value) in enumerate(line))]
    reach = max(2, len(line) // 24)
    lowest, highest = min(value for _, value in line), max(value for _, value in line)
    smoothed = []
    for index, (step, _) in enumerate(line):
        first, last = max(0, index - reach), min(len(line), index + reach + 1)
        count, centre = last - first, (first + last - 1) / 2
        mean = (sums[last] - sums[first]) / count
        slope = (moments[last] - moments[first] - centre * mean * count) * 12 / (count**3 - count)
        # At a bend the fit can leave the range of what was measured: a learning rate below zero.
        smoothed.append((step, min(max(mean + slope * (index - centre), lowest), highest)))
    return smoothed


def value_range(series: list[Series]) -> tuple[float, float]:
    """The range to show: all of the smoothed lines and chance levels, from zero unless that would
    waste the chart."""
    values = [value for one in series for line in one.lines for _, value in smooth(line)]
    values += [level for one in series for level in one.chance if level is not None]
    low, high = min(values), max(values)
    if low >= 0:
        low = 0.0 if low <= 0.7 * high else low
    return (low, high) if high > low else (min(0.0, low), max(0.0, high) if high else 1.0)


def _path(line: Line, axis: Axis, low: float, high: float) -> str:
    """SVG path in a box of 1000 x 100; a single point is a dot by its round caps."""
    points = []
    for step, value in line:
        clamped = min(max(value, low), high)
        points.append(f"{1000 * step / max(1, axis.total):.1f} {100 - 100 * (clamped - low) / (high - low):.2f}")
    return "M" + "L".join(points if len(points) > 1 else points * 2)


def _curves(series: list[Series], axis: Axis, low: float, high: float) -> str:
    raw, smoothed = [], []
    for one in series:
        dotted = " dotted" if one.dotted else ""
        for line in filter(None, one.lines):
            sparse = len(line) < SPARSE
            if not sparse:
                raw.append(f'<path class="raw {one.colour}" d="{_path(thin(line, 2 * MAX_POINTS), axis, low, high)}"/>')
            shown = thin(smooth(line), MAX_POINTS)
            smoothed.append(f'<path class="line {one.colour}{dotted}" d="{_path(shown, axis, low, high)}"/>')
            if sparse:
                dots = "".join(_path([point], axis, low, high) for point in line)
                smoothed.append(f'<path class="dots {one.colour}" d="{dots}"/>')
    return "".join(raw + smoothed)


def _levels(series: list[Series], axis: Axis, low: float, high: float) -> str:
    """A horizontal line at the chance level of each stage."""
    parts = []
    for one in series:
        for level, (_, first, last) in zip(one.chance, axis.stages, strict=False):
            if level is not None:
                parts.append(f'<path class="level {one.colour}" d="{_path([(first, level), (last, level)], axis, low, high)}"/>')
    return "".join(parts)


def _borders(axis: Axis, height: int, labels: bool) -> str:
    parts = []
    for name, first, last in axis.stages:
        x = axis.percent(first)
        parts.append(f'<line class="border" data-stage="{escape(name)}" x1="{x}" x2="{x}" y1="-22" y2="{height}"/>')
        if labels:
            # A nested svg clips a long name at the end of its stage.
            parts.append(
                f'<svg x="{x}" y="-22" width="{axis.percent(last - first)}" height="18"><title>{escape(name)}</title>'
                f'<text class="stage-name" x="7" y="13">{escape(name)}</text></svg>'
            )
    return "".join(parts)


def step_ticks(axis: Axis, y: int, about: int = 5) -> str:
    """The numbers under a step axis, the last one only where it does not run out of the picture."""
    unit = f'<text class="tick" x="50%" y="{y + 16}">optimizer step</text>'
    marks = [step for step in ticks(0, axis.total, about) if step <= axis.total]
    return unit + "".join(
        f'<text class="tick {"last" if mark > 0.95 * axis.total else ""}" x="{axis.percent(mark)}" y="{y}">'
        f"{format_number(mark)}</text>"
        for mark in marks
    )


def plot(series: list[Series], axis: Axis, label: str, height: int = 220, small: bool = False) -> str:
    """Curves over the steps of the run, and their values as JSON for the hover read-out."""
    low, high = value_range(series)
    marks = ticks(low, high, 3 if small else 5)
    low, high = marks[0], marks[-1]
    grid = []
    for mark in marks:
        y = f"{height - height * (mark - low) / (high - low):.1f}"
        grid.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        grid.append(f'<text class="tick y" x="-8" y="{y}" dy="4">{format_number(round(mark, 12))}</text>')
    curves = _levels(series, axis, low, high) + _curves(series, axis, low, high)
    return (
        f'<div class="box"><svg class="plot" tabindex="0" role="img" aria-label="{escape(label)}" height="{height}">'
        f"{''.join(grid)}{_borders(axis, height, labels=not small)}"
        f'<svg class="stretch" viewBox="0 0 1000 100" preserveAspectRatio="none" width="100%" height="{height}">'
        f'{curves}</svg>{step_ticks(axis, height + 18, 3 if small else 5)}<line class="cross" y2="{height}"/></svg>'
        f'<script type="application/json">{script_json([_for_hover(one) for one in series])}</script>'
        '<div class="tip" role="status" hidden></div></div>'
    )


def _for_hover(series: Series) -> dict[str, Any]:
    lines = []
    for line in series.lines:
        shown = thin(smooth(line), MAX_POINTS)
        lines.append([[step for step, _ in shown], [float(f"{value:.4g}") for _, value in shown]])
    colour = f"{series.colour} dotted" if series.dotted else series.colour
    return {"label": series.label, "colour": colour, "lines": lines, "chance": series.chance}


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element whatever its strings hold."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def band(spans: list[Span], axis: Axis, label: str, height: int = 18) -> str:
    """One parameter group over the run: filled by the trained share, hatched if frozen."""
    parts = []
    for first, last, share, why in spans:
        x, width = axis.percent(first), axis.percent(last - first)
        # A few trained biases must still be seen, a few frozen ones too.
        filled = share and min(max(share, 0.25), 1.0 if share == 1 else 0.75)
        parts.append(f'<g data-trained="{share:.3f}"><title>{escape(why)}</title>')
        if share < 1:
            parts.append(f'<rect class="frozen" x="{x}" width="{width}" height="{height}"/>')
        if filled:
            y = height * (1 - filled)
            parts.append(f'<rect class="trained" x="{x}" y="{y:.1f}" width="{width}" height="{height - y:.1f}"/>')
        parts.append("</g>")
    for _, first, _ in axis.stages:
        x = axis.percent(first)
        parts.append(f'<line class="border" x1="{x}" x2="{x}" y1="-4" y2="{height + 4}"/>')
    return (
        f'<svg class="band" role="img" aria-label="{escape(label)}" height="{height}">{"".join(parts)}'
        f'<line class="cross" y1="-30" y2="{height}"/></svg>'
    )


def bar(value: float, chance: float | None, top: float) -> str:
    """A horizontal bar from 0 to `top` with a notch at the chance level."""
    width = 100 * min(max(value / top, 0.0), 1.0) if top > 0 and math.isfinite(value) else 0.0
    notch = ""
    if chance is not None and top > 0 and math.isfinite(chance):
        x = f"{100 * min(max(chance / top, 0.0), 1.0):.2f}%"
        notch = f'<line class="chance" x1="{x}" x2="{x}" y1="0" y2="12"/>'
    return (
        '<svg class="bar" height="12" aria-hidden="true"><rect class="track" y="3" width="100%" height="6" rx="3"/>'
        f'<rect class="value" y="3" width="{width:.2f}%" height="6" rx="3"/>{notch}</svg>'
    )
