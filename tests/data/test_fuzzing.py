"""Damaged files are named or read right, by every reader of data."""

from __future__ import annotations

from pathlib import Path

from fuzzing import fuzz


def test_damaged_files_are_named_or_read_right(tmp_path: Path) -> None:
    found, faults = fuzz(600, tmp_path)
    assert faults == []
    assert all(outcomes["named"] > 5 and outcomes.total() == 100 for outcomes in found.values()), found
