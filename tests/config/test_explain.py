"""Errors of the command line say what to do."""

from __future__ import annotations

import sys

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from lightning_internvl.config.explain import explain


def test_another_file_beside_resume_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "resume=runs/a", "data.path=b.jsonl"])
    said = explain(ValueError("Could not override 'data.path'.\nKey 'path' is not in struct"))
    assert said.startswith("resume goes on with a run exactly as it was")
    assert "leave out data.path, or start anew with init_from=runs/a" in said


def test_a_value_that_is_taken_from_what_is_not_there_names_both() -> None:
    config = OmegaConf.create({"encoder": {"_target_": "inherited"}, "data": {"image_size": "${encoder.image_size}"}})
    with pytest.raises(InterpolationKeyError) as told:
        OmegaConf.to_container(config, resolve=True)
    said = explain(told.value)
    assert said.startswith("data.image_size is that of encoder.image_size, which is not there; ")
    assert said.endswith("choose another encoder, or give data.image_size=VALUE")
