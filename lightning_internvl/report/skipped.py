"""Samples that training has skipped: how many of each source and kind, with an example."""

from __future__ import annotations

import json
from collections import Counter
from html import escape
from pathlib import Path

from lightning_internvl.report.read import RunFiles
from lightning_internvl.report.sections import html_table, row_group, section

LONGEST = 300  # characters of an example


def skipped_samples(run: RunFiles) -> str:
    """A table over all stages; nothing where every sample was of use."""
    bodies = [_stage(stage.name, Path(run.folder) / "stages" / stage.name) for stage in run.stages]
    table = html_table(("kind", "source", "samples", "for example"), bodies)
    return section("skipped", "Skipped samples", "All are named in skipped.jsonl.", table) if any(bodies) else ""


def _stage(name: str, folder: Path) -> str:
    counts, examples = Counter[tuple[str, str]](), dict[tuple[str, str], str]()
    for path in sorted(folder.glob("skipped*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                row = _row(line)
                key = str(row["kind"]), str(row.get("source", ""))
                counts[key] += 1
                examples.setdefault(key, str(row["reason"])[:LONGEST])
    rows = "".join(
        f'<tr><th scope="row">{escape(kind)}</th><td>{escape(source)}</td><td>{count:,}</td>'
        f'<td class="why">{escape(examples[kind, source])}</td></tr>'
        for (kind, source), count in counts.most_common()
    )
    return row_group(name, 4, [rows]) if rows else ""


def _row(line: str) -> dict[str, str]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # a kill in the middle of a write
        return {"kind": "torn line", "reason": line.strip()}
