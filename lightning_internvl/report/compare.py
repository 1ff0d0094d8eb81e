"""Runs side by side: settings that differ, metrics, curves over each other, answers that changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_internvl.files import RUN_CONFIG, write_text
from lightning_internvl.messages import flat, hidden
from lightning_internvl.report.changes import changes
from lightning_internvl.report.charts import Axis, Line, Series, plot, script_json
from lightning_internvl.report.curves import LEVEL, NO_CURVE, chance_of, line_of, title_of
from lightning_internvl.report.frame import page
from lightning_internvl.report.metric_words import about
from lightning_internvl.report.metrics_table import format_number, with_chance
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import RunFiles, StageFiles, read_run
from lightning_internvl.report.sections import html_table, metric_cell, minutes, row_group, section
from lightning_internvl.report.tables import timing_text, timing_title

LETTERS = "ABCDEFGH"
OWN = "paths."  # settings that every run has for itself
UNSET = '<span class="why">not set</span>'
Runs = dict[str, RunFiles]  # by letter


def write_comparison(run_dirs: Sequence[Path], target: Path) -> Path:
    """Write one page about several runs; return its path. Of files that are missing or damaged
    nothing is shown.

    Raises:
        ValueError: for too many runs, one that is given twice, or a folder that is no run.
    """
    if not 2 <= len(run_dirs) <= len(LETTERS):
        raise ValueError(f"{len(run_dirs)} runs: a page lays 2 to {len(LETTERS)} side by side")
    places = [run.resolve() for run in run_dirs]
    if twice := next((run for run, place in zip(run_dirs, places, strict=True) if places.count(place) > 1), None):
        raise ValueError(f"{twice} is given twice: there would be nothing to compare")
    for run in run_dirs:
        check_run(run)
    runs = dict(zip(LETTERS, map(read_run, run_dirs), strict=False))
    pictures = Pictures()
    shown = [
        ("settings", "Settings", settings(runs)),
        ("metrics", "Metrics", metrics(runs)),
        ("curves", "Curves", curves(runs)),
        ("changes", "Answers", changes(_stages(runs), pictures)),
        ("timing", "Time", timing(runs)),
    ]
    footer = "Made from the files in " + ", ".join(f"<code>{escape(str(run))}</code>" for run in run_dirs) + "."
    title = f"Runs side by side: {', '.join(run.folder for run in runs.values())}"
    write_text(target, page(title, _header(runs), shown, pictures, footer))
    return target


def check_run(folder: Path) -> None:
    """Raise ValueError for what is no folder of a run."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give that of a run, as outputs/NAME/TIME")
    if not (folder / RUN_CONFIG).is_file():
        raise ValueError(f"{folder} is no run: it holds no {RUN_CONFIG}; give the folder that training printed at its end")


def _header(runs: Runs) -> str:
    items = []
    for place, (letter, run) in enumerate(runs.items()):
        seconds = sum(stage.seconds for stage in run.stages)
        took = f"{run.total_steps:,} steps · {minutes(seconds)}" if run.total_steps else "nothing trained yet"
        unread = f"<small>could not be read: {escape(', '.join(run.damaged))}</small>" if run.damaged else ""
        name = f"<b><i></i>{letter} · {escape(run.folder)}</b><span>{escape(run.recipe)} · {took}</span>"
        items.append(f'<li class="c-{place}">{name}{unread}</li>')
    return f'<header><h1>Runs side by side</h1><ol class="runs">{"".join(items)}</ol></header>'


def settings(runs: Runs) -> str:
    """The settings that are not the same in all runs; secrets stay hidden."""
    of = {letter: {name: _text(value) for name, value in flat(hidden(run.config))} for letter, run in runs.items()}
    names = dict.fromkeys(name for known in of.values() for name in known if not name.startswith(OWN))
    rows = []
    for name in names:
        values = [known.get(name) for known in of.values()]
        if len(set(values)) > 1:
            cells = "".join(f"<td>{UNSET if value is None else escape(value)}</td>" for value in values)
            rows.append(f'<tr><th scope="row">{escape(name).replace(".", ".<wbr>")}</th>{cells}</tr>')
    table = (
        html_table(["setting", *runs], [f"<tbody>{''.join(rows)}</tbody>"]) if rows else "<p>None: all runs have the same.</p>"
    )
    return section("settings", "Settings that differ", "All others are the same.", f'<div class="settings">{table}</div>')


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _stages(runs: Runs) -> dict[str, dict[str, StageFiles]]:
    """By name, those of each run that has one."""
    names = dict.fromkeys(stage.name for run in runs.values() for stage in run.stages)
    return {name: {a: one for a, run in runs.items() for one in run.stages if one.name == name} for name in names}


def metrics(runs: Runs) -> str:
    """All metrics, a column for each run; of two runs also the difference."""
    bodies, two = [], len(runs) == 2
    for name, of in _stages(runs).items():
        values = {a: {key: (value, chance) for key, value, chance in with_chance(stage.metrics)} for a, stage in of.items()}
        rows = []
        for key in dict.fromkeys(key for known in values.values() for key in known):
            found = [values.get(letter, {}).get(key) for letter in runs]
            chance = next((one[1] for one in found if one and one[1] is not None), None)
            cells = ["" if one is None else format_number(one[0]) for one in found]
            cells.append("" if chance is None else format_number(chance))
            if two:
                a, b = found
                cells.append(f"{b[0] - a[0]:+.3g}" if a and b else "")
            rows.append(f"<tr>{metric_cell(key)}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        if rows:
            bodies.append(row_group(name, len(runs) + 2 + two, rows))
    head = ["metric", *runs, "chance", *(["B − A"] if two else [])]
    return section(
        "metrics", "Metrics", "On held-out data, at the end of each stage.", html_table(head, bodies) if bodies else ""
    )


def curves(runs: Runs) -> str:
    """Every logged quantity, a line for each run; a stage begins for all of them where the longest
    of the one before has ended."""
    stages = {name: of for name, of in _stages(runs).items() if any(one.steps for one in of.values())}
    spans, start = [], 0
    for name, of in stages.items():
        spans.append((name, start, start := start + max(one.steps for one in of.values())))
    axis = Axis(start, spans)
    rows = [row for of in stages.values() for one in of.values() for row in one.history]
    panels = []
    for key in dict.fromkeys(key for row in rows for key in row if key not in NO_CURVE):
        series = [
            Series(letter, f"c-{place}", [_line(stages[name].get(letter), key, first) for name, first, _ in spans])
            for place, letter in enumerate(runs)
        ]
        if series := [one for one in series if any(one.lines)]:
            title = title_of(key)
            legend = "".join(f'<li class="{one.colour}"><i></i>{one.label}</li>' for one in series)
            levels = [_chance(of, key) for of in stages.values()]
            if any(level is not None for level in levels):
                series.append(Series("chance", "c-total", [[] for _ in spans], chance=tuple(levels)))
                legend += LEVEL
            caption = (
                f'<figcaption title="{escape(about(key))}"><b>{escape(title)}</b><ul class="legend">{legend}</ul></figcaption>'
            )
            panels.append(f'<figure class="panel">{caption}{plot(series, axis, f"{title} over optimizer steps", 150)}</figure>')
    described = escape(script_json({"total": axis.total, "stages": axis.stages}))
    body = f'<div class="small" data-axis="{described}">{"".join(panels)}</div>' if panels else ""
    lead = "By optimizer steps, stage by stage. Point at a chart, or focus it and use the arrow keys, to read its values."
    return section("curves", "Curves over each other", lead, body)


def _chance(of: dict[str, StageFiles], key: str) -> float | None:
    """The chance level of a curve in one stage of several runs, as the first that has one knows it."""
    levels = (level for stage in of.values() for level in chance_of([stage], key))
    return next(levels, None)


def _line(stage: StageFiles | None, key: str, start: int) -> Line:
    return [] if stage is None else line_of(stage, key, start)


def timing(runs: Runs) -> str:
    """What each stage took, a column for each run."""
    bodies = []
    for name, of in _stages(runs).items():
        rows = []
        for key in dict.fromkeys(key for stage in of.values() for key in stage.timing):
            texts = [timing_text(key, of[letter].timing.get(key) if letter in of else None) for letter in runs]
            cells = "".join(f"<td>{text}</td>" for text in texts)
            rows.append(f'<tr><th scope="row">{escape(timing_title(key))}</th>{cells}</tr>')
        if rows:
            bodies.append(row_group(name, len(runs) + 1, rows))
    return section(
        "timing", "Time", "Each measured on the machine of its run.", html_table(["", *runs], bodies) if bodies else ""
    )
