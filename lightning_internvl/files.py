"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

RUN_CONFIG = "config.yaml"  # the resolved configuration of a run; a folder that holds it is a run


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, then move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def into_place(draft: Path, path: Path) -> None:
    """Move a whole file or folder to its place, where an older one may stand. A folder cannot be replaced in one step; should the
    process end in between, `from_aside` finds the older one."""
    if not path.is_dir():
        draft.replace(path)
        return
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    draft.rename(path)
    shutil.rmtree(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def from_aside(path: Path) -> None:
    """Put an older folder back that a move has left beside its place."""
    if not path.exists() and _aside(path).exists():
        with contextlib.suppress(FileNotFoundError):  # another process has been faster
            _aside(path).rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.older")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, numbers unrounded."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """The contents of a JSON file, or the default where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
