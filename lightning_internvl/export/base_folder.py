"""What a run started from, as far as it is on this machine: an official folder, or one of the
Hugging Face cache. Nothing is fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_internvl.files import RUN_CONFIG, read_json
from lightning_internvl.hub import cached_folder


def is_hub_id(name: str) -> bool:
    """Whether what a run started from is a name that others know."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def base_folder(start: str | None) -> Path | None:
    """The folder of what a run started from (`init_from`, or a part's `pretrained`); None for a
    run of ours, a bare file, and what is not on this machine."""
    if not start:
        return None
    folder = Path(start)
    if is_hub_id(start):
        try:
            folder = Path(cached_folder(start))
        except (OSError, ValueError):  # not in the cache, or no id at all
            return None
    return folder if (folder / "config.json").is_file() and not (folder / RUN_CONFIG).exists() else None


def base_chat_template(folder: Path | None, tokenizer: Any) -> str | None:
    """The chat template of a base: that of its processor (`chat_template.jinja`, and
    `chat_template.json` of older folders), else the one that its tokenizer has brought."""
    if folder is not None:
        if (file := folder / "chat_template.jinja").is_file():
            return file.read_text(encoding="utf-8")
        if isinstance(text := _fields(folder / "chat_template.json").get("chat_template"), str):
            return text
    held = getattr(tokenizer, "chat_template", None)
    return held.get("default") if isinstance(held, Mapping) else held


def licence_of(folder: Path | None) -> str | None:
    """The licence that a base states, in the fields at the beginning of its README.md or in its
    `config.json`; None where it states none, or is not on this machine."""
    if folder is None:
        return None
    for stated in (_front_matter(folder / "README.md").get("license"), _fields(folder / "config.json").get("license")):
        if isinstance(stated, str) and stated.strip():
            return stated.strip()[:80]
    return None


def _front_matter(readme: Path) -> Mapping[str, Any]:
    """The fields between the lines `---` at the beginning of a README.md."""
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2) if readme.is_file() else []
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, Mapping) else {}


def files_of(folder: Path) -> list[Path]:
    """What a base is made of: its weights, and all that says how they are read."""
    kinds = (".safetensors", ".bin", ".pth", ".pt", ".json", ".jinja", ".model", ".txt", ".tiktoken")
    found = []
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [Path(place) / name for name in names if name.endswith(kinds)]
    return sorted(found)


def _fields(path: Path) -> Mapping[str, Any]:
    try:
        found = read_json(path, {})
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, Mapping) else {}
