"""Putting the page together and in its place."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources
from pathlib import Path

from lightning_internvl.files import write_text
from lightning_internvl.report import cases, curves, filters, sections, similarity, skipped, tables, timeline
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import RunFiles, read_run

HATCH = (
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line class="hatch" y2="6"/></pattern>'
)
LINKS = {
    "curves": "Curves",
    "filter": "Filter",
    "similarity": "Similarity",
    "retrieval": "Retrieval",
    "over-time": "Over time",
    "cases": "Right and wrong",
    "skipped": "Skipped",
    "metrics": "Metrics",
    "timing": "Time",
    "freezing": "Freezing",
    "config": "Configuration",
}


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what files the run folder has; return its path.

    The page stands alone: no request leaves it, and it can be written again at any time, also while
    the run goes on.

    Raises:
        NotADirectoryError: `run_dir` is no folder.
    """
    run_dir = Path(run_dir)
    page = render(read_run(run_dir))
    target = run_dir / "report.html"
    write_text(target, page)
    return target


def render(run: RunFiles) -> str:
    """The HTML page of a run."""
    style, script = (
        resources.files("lightning_internvl.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    pictures = Pictures()
    body = [
        curves.curves(run),
        filters.filters(run, pictures),
        similarity.similarity_matrices(run, pictures),
        similarity.retrieval(run, pictures),
        timeline.over_time(run, pictures),
        cases.cases(run, pictures),
        skipped.skipped_samples(run),
        tables.tables(run),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in LINKS.items() if f' id="{name}"' in "".join(body))
    # Names and captions are escaped; should one slip through, the policy still runs no script but
    # ours.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>Alignment report: {escape(run.recipe)}</title><style>{style}</style></head><body>"
        f'<svg class="definitions" aria-hidden="true"><defs>{HATCH}{pictures.symbols()}</defs></svg>'
        f"<main>{sections.header(run)}<nav>{links}</nav>{''.join(body)}"
        f"<footer>Made from the files in <code>{escape(run.folder)}</code>.</footer></main>"
        f"<script>{script}</script></body></html>"
    )
