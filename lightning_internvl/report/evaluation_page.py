"""One self-contained page of an evaluation: numbers, how they were got, and cases."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_internvl.files import read_json, write_text
from lightning_internvl.report.cases import case_lists
from lightning_internvl.report.metrics_table import format_number, scored_of, times_chance, values_of
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.sections import html_table, section

# Should a text slip through, it runs nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NAMED = 20  # samples without a score that are named on the page


def write_page(folder: Path) -> Path:
    """Write FOLDER/index.html from what the tasks have left; return its path."""
    pictures, parts, links = Pictures(), [], []
    for number, (task, metrics) in enumerate(read_json(folder / "metrics.json", {}).items()):
        record, cases = read_json(folder / task / "record.json", {}), read_json(folder / task / "cases.json", [])
        parts.append(_section(f"task-{number}", task, metrics, record, cases, pictures))
        links.append(f'<a href="#task-{number}">{escape(task)}</a>')
    style = resources.files("lightning_internvl.report").joinpath("page.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>Evaluation: {escape(folder.name)}</title><style>{style}</style></head><body>"
        f'<svg class="definitions" aria-hidden="true"><defs>{pictures.symbols()}</defs></svg>'
        f"<main><header><h1>Evaluation</h1><nav>{''.join(links)}</nav></header>{''.join(parts)}"
        f"<footer>Made from the files in <code>{escape(str(folder))}</code>.</footer></main></body></html>"
    )
    write_text(folder / "index.html", page)
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
        f'<tr><th scope="row">{escape(name)}</th><td>{format_number(value)}</td>'
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
