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
HYDRA = [ROOT / "lightning_internvl" / name for name in ("cli.py", "config/explain.py", "config/sweep.py", "config/targets.py")]
LONGEST = 400  # lines

# Folders and root files, from top to bottom. An import goes from one line to a line further down.
HOUSE = (
    "train.py evaluate.py chat.py export.py",
    "callbacks doctor",
    "pipeline.py evaluation",
    "cli.py filtering plan export",
    "chat validate training reuse",
    "__init__.py inference",
    "checkpoints",
    "stages",
    "model",
    "config",
    "data middleware decoders objectives",
    "distributed encoders",
    "report layers hub.py",
    "console.py",
    "launch.py choices.py",
    "files.py",
    "messages.py protocols.py",
)


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


def room_of(path: Path) -> str:
    """The line of `HOUSE` to which a source file belongs: a folder's name, or that of a file at a root."""
    parts = path.relative_to(ROOT).parts
    return parts[1 if parts[0] == "lightning_internvl" else 0]


def arrows() -> list[tuple[Path, Path]]:
    """All imports from one source file to another, anywhere in the files."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCE}
    files = {name.removesuffix(".__init__"): path for name, path in names.items()}
    found = []
    for path in SOURCE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [name if name in files else str(node.module) for name in full]
            else:
                continue
            found += [(path, files[target]) for target in targets if target in files]
    return [(path, target) for path, target in found if path != target]


def test_imports_point_down() -> None:
    """So packages form no ring. A file that this names belongs elsewhere, or what it imports does."""
    floor = {room: row for row, rooms in enumerate(HOUSE) for room in rooms.split()}
    assert not sorted({room_of(path) for path in SOURCE} - floor.keys()), "no line of HOUSE"
    crossing = [(a, b) for a, b in arrows() if room_of(a) != room_of(b)]
    assert not [f"{called(a)} imports {called(b)}" for a, b in crossing if floor[room_of(a)] >= floor[room_of(b)]]


def test_files_form_no_circle() -> None:
    imports: dict[Path, set[Path]] = {path: set() for path in SOURCE}
    for path, target in arrows():
        imports[path].add(target)
    while free := [path for path, targets in imports.items() if not targets]:
        for path in free:
            del imports[path]
        for targets in imports.values():
            targets.difference_update(free)
    assert not sorted(map(called, imports))


def test_folders_are_no_heaps() -> None:
    package = ROOT / "lightning_internvl"
    assert len(list(package.glob("*.py"))) <= 10
    assert len(list((package / "data").glob("*.py"))) <= 9


def test_parts_do_not_know_lightning() -> None:
    for folder in ("encoders", "middleware", "decoders", "objectives", "layers", "model"):
        for path in (ROOT / "lightning_internvl" / folder).rglob("*.py"):
            assert "lightning" not in imported(path), called(path)


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
