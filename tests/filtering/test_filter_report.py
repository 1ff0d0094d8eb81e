"""The section of the report about filters, of summaries as they are and as they should not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_internvl.report import write_report

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x>"
SUMMARY = {
    "pairs": 100, "kept": 40, "dropped": {"side": 10, "top_share": 50}, "unusable": {}, "similarity_from": 0.3,
    "histograms": {"similarity": [[-0.1, 0.0, 30, 0], [0.3, 0.325, 70, 40]], "side": [[64, 90.5, 100, 40]]},
}  # fmt: skip


def page(run: Path, **changes: Any) -> str:
    (run / "filter").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("name: run\npipeline: [contrastive, filter]\n")
    (run / "filter" / "summary.json").write_text(json.dumps(SUMMARY | changes))
    return write_report(run).read_text()


def test_counts_and_histograms_are_shown(tmp_path: Path) -> None:
    found = page(tmp_path)
    assert "keeps 40 of 100 pairs" in found
    assert "dropped: top share" in found
    assert "0.3 to 0.325: 40 of 70 pairs kept" in found
    assert found.count('<line class="border"') == 1  # where the top share begins
    assert "side: pairs seen and kept" in found
    assert '<a href="#filter">Filter</a>' in found


def test_languages_and_pairs_are_shown(tmp_path: Path) -> None:
    languages = {"en": {"pairs": 50, "kept": 40, "side": 10}, HOSTILE: {"pairs": 50, "scripts": 50}}
    pair = {"caption": HOSTILE, "language": "en", "similarity": 0.25, "png": "iVBO"}
    found = page(tmp_path, languages=languages, shown=[{**pair, "rule": "kept"}, {**pair, "rule": "top_share"}, 3])
    assert '<th scope="row">en</th><td>50</td><td>80.0 %</td><td>0.0 %</td><td>20.0 %</td>' in found
    assert found.count('<ol class="cases">') == 2
    assert "<dt>dropped by</dt><dd>top share</dd>" in found
    assert HOSTILE not in found


@pytest.mark.parametrize(
    "change",
    [
        {"languages": {"en": 3, "de": [1]}, "shown": {"png": 1}},
        {"histograms": {HOSTILE: [[0, 1, 2, 1]]}, "dropped": {HOSTILE: 3}},
        {"histograms": {"side": [["a", 1, 2, 3], [1, 2], None, [1, 2, float("nan"), 0], [0, 0, 0, 0]]}},
        {"histograms": [1], "dropped": 3, "unusable": None, "pairs": HOSTILE},
        {"histograms": {"similarity": "no"}, "similarity_from": HOSTILE},
    ],
)
def test_strange_summaries_break_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    found = page(tmp_path, **change)
    assert HOSTILE not in found
    assert "<script>alert" not in found
    assert 'id="filter"' in found


def test_a_run_without_a_filter_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: run\npipeline: [contrastive]\n")
    assert 'id="filter"' not in write_report(tmp_path).read_text()
