"""One self-contained page of an evaluation: numbers, how they were got, and cases."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from lightning_internvl.files import read_json, write_text
from lightning_internvl.report.cases import case_lists
from lightning_internvl.report.frame import page
from lightning_internvl.report.metrics_table import format_number, scored_of, times_chance, values_of
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.sections import html_table, metric_cell, section

NAMED = 20  # samples without a score that are named on the page


def write_page(folder: Path) -> Path:
    """Write FOLDER/index.html from what the tasks have left; return its path."""
    pictures, sections = Pictures(), []
    for number, (task, metrics) in enumerate(read_json(folder / "metrics.json", {}).items()):
        record, cases = read_json(folder / task / "record.json", {}), read_json(folder / task / "cases.json", [])
        name = f"task-{number}"
        sections.append((name, task, _section(name, task, metrics, record, cases, pictures)))
    footer = f"Made from the files in <code>{escape(str(folder))}</code>."
    html = page(f"Evaluation: {folder.name}", "<header><h1>Evaluation</h1></header>", sections, pictures, footer)
    write_text(folder / "index.html", html)
    return folder / "index.html"


def _section(
    name: str, task: str, metrics: dict[str, float], record: dict[str, Any], cases: list[dict[str, Any]], pictures: Pictures
) -> str:
    scored = scored_of(metrics)
    lead = escape(record.get("model", {}).get("place", "")) + (f" · {scored} samples" if scored else "")
    body = [_table(metrics), _missing(record), _settings(record)]
    body.append(case_lists(cases, pictures))
    return section(name, escape(task), lead, "".join(body))


def _table(metrics: dict[str, float]) -> str:
    rows = "".join(
        f"<tr>{metric_cell(name)}<td>{format_number(value)}</td>"
        f"<td>{'' if chance is None else format_number(chance)}</td><td>{times_chance(value, chance)}</td></tr>"
        for name, value, chance in values_of(metrics)
    )
    return html_table(("metric", "value", "chance", "× chance"), [f"<tbody>{rows}</tbody>"])


def _missing(record: dict[str, Any]) -> str:
    if not record.get("missing"):
        return ""
    named = list(record["missing_named"].items())[:NAMED]
    items = "".join(f"<li><code>{escape(key)}</code>: {escape(reason)}</li>" for key, reason in named)
    return f'<div class="note">{record["missing"]:,} samples could not be scored, among them<ul>{items}</ul></div>'


def _settings(record: dict[str, Any]) -> str:
    told = ("task", "settings", "model", "missing", "missing_named", "metrics")
    rows = {**record.get("settings", {}), **record.get("model", {}), **{k: v for k, v in record.items() if k not in told}}
    text = "\n".join(f"{name}: {value}" for name, value in rows.items())
    return f"<details><summary>How this was measured</summary><pre>{escape(text)}</pre></details>"
