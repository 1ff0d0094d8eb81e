"""Errors of the command line say what to do."""

from __future__ import annotations

import sys

import pytest

from lightning_internvl.config.explain import explain


def test_another_file_beside_resume_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "resume=runs/a", "data.path=b.jsonl"])
    said = explain(ValueError("Could not override 'data.path'.\nKey 'path' is not in struct"))
    assert said.startswith("resume goes on with a run exactly as it was")
    assert "leave out data.path, or start anew with init_from=runs/a" in said
