"""The report of one run in its place."""

from __future__ import annotations

from html import escape
from pathlib import Path

from lightning_internvl.files import write_text
from lightning_internvl.report import cases, curves, film, filters, sections, skipped, tables
from lightning_internvl.report.frame import page
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import RunFiles, read_run

REPORT = "report.html"


def write_report(run_dir: Path, target: Path | None = None) -> Path:
    """Write RUN/report.html, or another file, from what files the run folder has; return its path.

    The page stands alone: no request leaves it, and it can be written again at any time, also while
    the run goes on.

    Raises:
        NotADirectoryError: `run_dir` is no folder.
    """
    run_dir = Path(run_dir)
    target = target or run_dir / REPORT
    write_text(target, render(read_run(run_dir)))
    return target


def render(run: RunFiles) -> str:
    """The HTML page of a run."""
    pictures = Pictures()
    shown = [
        ("film", "Film", film.film(run, pictures)),
        ("stages", "Stages", sections.stages(run)),
        ("curves", "Curves", curves.curves(run)),
        ("filter", "Filter", filters.filters(run, pictures)),
        ("cases", "Right and wrong", cases.cases(run, pictures)),
        ("skipped", "Skipped", skipped.skipped_samples(run)),
        ("metrics", "Metrics", tables.metrics(run)),
        ("timing", "Time", tables.timing(run)),
        ("freezing", "Freezing", tables.freezing(run)),
        ("config", "Configuration", tables.configuration(run)),
    ]
    footer = f"Made from the files in <code>{escape(run.folder)}</code>."
    return page(f"Alignment report: {run.recipe}", sections.header(run), shown, pictures, footer)
