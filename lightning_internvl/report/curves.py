"""The curves over all stages, and beneath them which parameters trained when."""

from __future__ import annotations

import math
import re
from html import escape

from lightning_internvl.report.charts import Axis, Line, Series, Span, band, plot, script_json, step_ticks
from lightning_internvl.report.metric_words import words
from lightning_internvl.report.read import RunFiles, StageFiles
from lightning_internvl.report.sections import count, section

OBJECTIVES = {
    "itc": "ITC, image-text contrastive",
    "siglip": "SigLIP, sigmoid pairs",
    "itm": "ITM, image-text matching",
    "itg": "ITG, image-grounded text",
    "next-token": "next token",
}
NO_CURVE = {"step", "seconds", "epoch"}
LOSSES, SHARES, RATES = "Loss, nats", "Metrics while training, 0 to 1", "Learning rate"
HELD_OUT = ", held-out"
NEAREST = re.compile(r", (R@\d+|top \d+)")  # what differs in the words of metrics that share a chart
LEVEL = '<li class="level"><i></i>dashed: chance</li>'
COLOURS = 8  # that the style sheet has beside those of the objectives
TOTAL = "sum of the objectives"


def curves(run: RunFiles) -> str:
    """Every logged quantity over the steps of all stages, and which parameters trained when."""
    trained = [stage for stage in run.stages if stage.steps]
    axis = Axis(run.total_steps, [(stage.name, stage.start, stage.start + stage.steps) for stage in trained])
    charts = _charts(trained)
    heights = {title: height for title, height in ((LOSSES, 230), (SHARES, 180)) if title in charts}
    large = "".join(_panel(title, charts.pop(title), axis, heights[title]) for title in heights)
    ordered = sorted(charts, key=lambda title: not title.endswith(HELD_OUT))  # the others say how it went, not how well
    small = "".join(_panel(title, charts[title], axis, height=90) for title in ordered)
    parts = large + _bands(trained, axis) + (f'<div class="small">{small}</div>' if small else "")
    if not parts:
        return ""
    described = escape(script_json({"total": axis.total, "stages": axis.stages}))
    lead = (
        "All stages on one axis of optimizer steps. The faint line is what was logged, the strong one a local average. "
        "Point at a chart, or focus it and use the arrow keys, to read its values."
    )
    return section("curves", "Curves", lead, f'<div data-axis="{described}">{parts}</div>')


def _panel(title: str, series: list[Series], axis: Axis, height: int) -> str:
    chart = plot(series, axis, f"{title} over optimizer steps", height, small=height < 100)
    legend = _legend(series) if len(series) > 1 or title in (LOSSES, SHARES) or _leveled(series) else ""
    return f'<figure class="panel"><figcaption><b>{escape(title)}</b>{legend}</figcaption>{chart}</figure>'


def _leveled(series: list[Series]) -> bool:
    return any(level is not None for one in series for level in one.chance)


def _legend(series: list[Series]) -> str:
    """One entry per colour where there are several, one for all dotted lines together, and one for
    all chance levels."""
    named: dict[str, str] = {}
    for one in sorted(series, key=lambda one: one.dotted) if len(series) > 1 else series * (not _leveled(series)):
        named.setdefault(one.colour, one.label)
    items = [
        f'<li class="{colour}" data-label="{escape(label)}"><i></i>{escape(OBJECTIVES.get(label, label))}</li>'
        for colour, label in named.items()
    ]
    if any(one.dotted for one in series):
        items.append('<li class="c-total dotted"><i></i>dotted: validation</li>')
    items += [LEVEL] * _leveled(series)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _charts(stages: list[StageFiles]) -> dict[str, list[Series]]:
    """Series by the title of the chart that they belong to."""
    keys = dict.fromkeys(key for stage in stages for row in stage.history for key in row if key not in NO_CURVE)
    charts: dict[str, list[Series]] = {}
    names: dict[str, list[str]] = {}
    for key in keys:
        split, name = _split_key(key)
        measured = split == "val"
        covered = [not measured and _covers_another(name, stage) for stage in stages]
        lines = [[] if other else line_of(stage, key, stage.start) for stage, other in zip(stages, covered, strict=True)]
        if not any(lines):
            continue
        title = _title(key, name, lines)
        known = names.setdefault(title, [])
        if name not in known:
            known.append(name)
        colour = f"c-{name}" if name in OBJECTIVES else f"c-{known.index(name) % COLOURS}"
        if name == TOTAL or title == name or (title == RATES and len(known) == 1):
            colour = "c-total"
        if not measured:
            one = Series(name, colour, lines)
        elif title == LOSSES:
            one = Series("validation loss" if name == TOTAL else f"{name}, {split}", colour, lines, dotted=True)
        else:
            found = NEAREST.search(name)
            one = Series(found[1] if found else name, f"c-{known.index(name) % COLOURS}", lines, chance=chance_of(stages, key))
        charts.setdefault(title, []).append(one)
    order = [*OBJECTIVES, None, TOTAL]
    for series in charts.values():
        series.sort(key=lambda one: order.index(next((name for name in order if name and one.label.startswith(name)), None)))
    return charts


def chance_of(stages: list[StageFiles], key: str) -> tuple[float | None, ...]:
    """The chance level of what is measured while stages train, for each of them that has a curve;
    nothing where none is known."""
    name = key.removeprefix("val/")
    levels = tuple(stage.chance.get(name) if any(key in row for row in stage.history) else None for stage in stages)
    return levels if any(level is not None for level in levels) else ()


def title_of(key: str) -> str:
    """What a logged quantity is called: "ITC, image-text contrastive" of "train/itc"."""
    split, name = _split_key(key)
    return OBJECTIVES.get(name, name) + (HELD_OUT if split == "val" else "")


def _split_key(key: str) -> tuple[str, str]:
    """Split and name: ("train", "next-token") of "train/next_token_loss", ("val", "recall 5") of
    "val/recall_5"."""
    split, _, rest = key.partition("/")
    if split not in ("train", "val"):
        split, rest = "train", key
    plain = rest.lower().replace("_", "-")
    short = plain.removesuffix("-loss").removeprefix("loss-")
    return split, short if short in OBJECTIVES else TOTAL if plain == "loss" else words(rest)


def _title(key: str, name: str, lines: list[Line]) -> str:
    if name in OBJECTIVES or "loss" in name or name == TOTAL:
        return LOSSES
    if re.match(r"lr\b|learning rate", name):
        return RATES
    if key.startswith("val/"):
        return NEAREST.sub("", name) + HELD_OUT
    between = all(0 <= value <= 1 for line in lines for _, value in line)
    return SHARES if key.startswith("train/") and between else name


def _objectives(stage: StageFiles) -> int:
    keys = {key for row in stage.history for key in row}
    return len({name for split, name in map(_split_key, keys) if split == "train" and name in OBJECTIVES})


def _covers_another(name: str, stage: StageFiles) -> bool:
    """Whether it is the sum of the objectives of a stage that has one."""
    return name == TOTAL and _objectives(stage) == 1


def line_of(stage: StageFiles, key: str, start: int) -> Line:
    """A logged quantity of a stage that begins at `start` of an axis."""
    points = ((start + row["step"], row.get(key, math.nan)) for row in stage.history)
    return [(step, value) for step, value in points if math.isfinite(value)]


def _bands(stages: list[StageFiles], axis: Axis) -> str:
    entries = [entry for stage in stages for entry in stage.freezing]
    groups = dict.fromkeys(str(row.get("group")) for entry in entries for row in entry["rows"])
    if not groups:
        return ""
    parts = []
    for group in groups:
        sizes, spans = zip(*(found for stage in stages for found in _spans(stage, group)), strict=True)
        label = f'<p class="band-label"><b>{escape(group)}</b><span>{count(max(sizes))} parameters</span></p>'
        parts.append(label + band(list(spans), axis, f"{group}: when trained"))
    legend = '<ul class="legend"><li class="c-trained"><i></i>trained</li><li class="c-frozen"><i></i>frozen</li></ul>'
    ruler = f'<svg class="ruler" height="32" aria-hidden="true">{step_ticks(axis, 14)}</svg>'
    caption = f"<figcaption><b>What trained when</b>{legend}</figcaption>"
    return f'<figure class="bands">{caption}{"".join(parts)}{ruler}</figure>'


def _spans(stage: StageFiles, group: str) -> list[tuple[int, Span]]:
    """(parameters, span) of each stretch of the stage in which the group is known."""
    ends = [*(entry["step"] for entry in stage.freezing), stage.steps][1:]
    found = []
    for entry, last in zip(stage.freezing, ends, strict=True):
        first = entry["step"]
        for row in entry["rows"]:
            if str(row.get("group")) != group:
                continue
            trained, frozen = row.get("trained") or 0, row.get("frozen") or 0
            total = trained + frozen
            steps, count = f"steps {first:,} to {last:,}", f"{trained:,} of {total:,} parameters"
            why = f"{stage.name}, {steps}: {count} trained. {row.get('why') or ''}"
            found.append((total, (stage.start + first, stage.start + last, trained / max(1, total), why)))
    return found
