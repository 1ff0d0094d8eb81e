"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RUN_CONFIG = "config.yaml"  # the resolved configuration of a run; a folder that holds it is a run


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, then move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, numbers unrounded."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """The contents of a JSON file, or the default where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
