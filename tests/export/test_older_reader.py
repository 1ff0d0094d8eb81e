"""The comparison in another environment, run by the transformers that is installed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_internvl.config.targets import build
from lightning_internvl.export import older_reader, read_elsewhere, write
from lightning_internvl.export.report import ExportOptions
from lightning_internvl.export.settings import reader_faults
from lightning_internvl.export.write import export
from lightning_internvl.inference.load_run import open_run

OPTIONS = ExportOptions(transformers4=sys.executable)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds of another process."""
    monkeypatch.setattr(older_reader, "_run", lambda python, *arguments: read_elsewhere.main(*arguments))


@pytest.mark.usefixtures("run_here")
@pytest.mark.parametrize("recipe", ["llava_toy", "blip2_toy"])
def test_what_it_finds_is_reported(make_run: Callable[..., Path], tmp_path: Path, recipe: str) -> None:
    report = export(open_run(make_run(recipe), build), tmp_path / "out", OPTIONS)
    count = len(report.logits)  # a text alone is nothing to BLIP-2
    assert f": logits of {count} prompts within " in report.elsewhere
    assert report.elsewhere.endswith("of the largest, the same greedy ids and tokens")
    assert report.elsewhere in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.usefixtures("run_here")
def test_other_numbers_stop_the_export(make_run: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    compare = write.check_elsewhere

    def other(python: str, folder: Path, *arguments: Any) -> str:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -1}))
        return compare(python, folder, *arguments)

    monkeypatch.setattr(write, "check_elsewhere", other)
    with pytest.raises(ValueError, match=r"logits \(wide picture\) differ by .* \(by transformers 5\."):
        export(open_run(make_run("llava_toy"), build), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("python", "problem"), [("false", "does not read it: nothing was said"), ("no/python", "cannot be run")])
def test_a_python_that_cannot_read_it_says_why(tmp_path: Path, python: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"transformers4={python} {problem}"):
        older_reader._run(python, "folder", "AutoModel", str(tmp_path))


@pytest.mark.parametrize(("given", "problem"), [
    ({"check": ["transformers", "vlm"]}, "must be a list of some of transformers, transformers4, vllm, llama_cpp"),
    ({"check": ["transformers4"]}, "give transformers4=PYTHON, the Python of an environment"),
    ({"check": ["vllm"], "adapter": True}, "check=[vllm] reads whole models; use adapter=false"),
    ({"transformers4": sys.executable}, "has no effect without check="),
    ({"check": ["transformers4"], "transformers4": sys.executable, "adapter": True}, "reads whole models; use adapter=false"),
])  # fmt: skip
def test_settings(given: dict[str, Any], problem: str) -> None:
    usual = {"check": ["transformers"], "transformers4": None, "adapter": False}
    assert reader_faults(usual) == []
    (fault,) = reader_faults(usual | given)
    assert problem in fault


def test_a_layout_that_transformers_does_not_have(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"check=\[transformers4\] needs a layout that transformers loads, and minigpt4 is none"):
        export(open_run(make_run("minigpt4_toy"), build), tmp_path / "out", OPTIONS)
