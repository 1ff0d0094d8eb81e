"""Right and wrong answers in the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_internvl.files import write_json
from lightning_internvl.inference.journal import Journal
from lightning_internvl.report import write_report


def test_cases_of_a_stage_are_shown(tmp_path: Path) -> None:
    journal = Journal(cases=1)
    for answer in ("<b>pig</b>", "cow", "cow", "fox"):  # one right and one wrong case are kept
        picture = np.full((9, 16, 3), len(answer), np.uint8)
        journal.show(picture, question="what is it?", answer=answer, truth="cow", right=answer == "cow")
    write_json(tmp_path / "stages" / "supervised" / "cases.json", journal.shown)
    page = write_report(tmp_path).read_text()
    assert '<a href="#cases">Right and wrong</a>' in page
    assert "&lt;b&gt;pig&lt;/b&gt;" in page
    assert page.count("<dt>truth</dt>") == 2
    (tmp_path / "stages" / "supervised" / "cases.json").write_text("[1, ")
    assert "cases.json" in write_report(tmp_path).read_text()  # named as a file that cannot be read
