"""Rules of the source that no other test would see broken."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from runs import ROOT

LIBRARY = sorted((ROOT / "lightning_internvl").rglob("*.py"))
CALLBACKS = sorted((ROOT / "callbacks").rglob("*.py"))
SOURCE = [*LIBRARY, *CALLBACKS, *ROOT.glob("*.py")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
HYDRA = [ROOT / "lightning_internvl" / name for name in ("cli.py", "config/targets.py")]
LONGEST = 400  # lines


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def called(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LIBRARY, ids=called)
def test_the_library_imports_neither_hydra_nor_callbacks(path: Path) -> None:
    allowed = {"hydra", "omegaconf"} if path in HYDRA else set()
    assert not {"hydra", "omegaconf", "callbacks", "train"} & imported(path) - allowed


@pytest.mark.parametrize("path", CALLBACKS, ids=called)
def test_callbacks_do_not_import_hydra(path: Path) -> None:
    assert not {"hydra", "omegaconf", "train"} & imported(path)


def test_parts_and_objectives_do_not_know_stages_or_lightning() -> None:
    for folder in ("encoders", "middleware", "decoders", "objectives"):
        for path in (ROOT / "lightning_internvl" / folder).rglob("*.py"):
            assert "lightning" not in imported(path), called(path)
            assert not re.search(r"lightning_internvl\.(stages|pipeline|assembly|data)\b", path.read_text()), called(path)


@pytest.mark.parametrize("path", [*SOURCE, *TESTS], ids=called)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("path", SOURCE, ids=called)
def test_nothing_is_left_for_later(path: Path) -> None:
    assert not re.search(r"NotImplementedError|\b(TODO|FIXME|XXX)\b", path.read_text())


def test_the_training_script_holds_no_model_words() -> None:
    words = r"encoder|middleware|decoder|internvit|qllama|contrastive|generative|supervised"
    code = ast.parse((ROOT / "train.py").read_text())
    code.body = code.body[1:]  # without the docstring, which shows recipes
    assert not re.search(words, ast.unparse(code), re.IGNORECASE)
