"""Several sets with their weights: InternVL's meta files, and entries of `data.path`.

A meta file is a JSON object of sets: {NAME: {"root": where pictures start, "annotation": file of
records, "repeat_time": how often an epoch reads it, 1, "data_augment": false, "length": ...}}
(InternVL's `shell/data/*.json`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_internvl.data.files.record_fields import Fields
from lightning_internvl.messages import check_number, did_you_mean

LARGEST = 2**24  # bytes; a meta file lists sets, not records
ENTRY = ("path", "weight", "image_root")


@dataclass(frozen=True)
class WeightedSet:
    """One of several sets: its file, where its pictures start, how often an epoch reads each of its
    records, and what else was said of it that is not read."""

    path: Path
    root: Path | None = None
    times: float = 1.0
    unread: tuple[str, ...] = ()


def read_entry_of_path(given: Mapping[str, Any]) -> WeightedSet:
    """{path: FILE, weight: 2, image_root: FOLDER} in `data.path`.

    Raises:
        ValueError: for another key, no path, or a weight that is no number above 0.
    """
    for key in given:
        if key not in ENTRY:
            raise ValueError(f"data.path: an entry has no {key!r}; {did_you_mean(str(key), ENTRY)}")
    if not given.get("path"):
        raise ValueError(f"data.path: an entry needs a path: {{path: FILE, weight: 2}}, not {dict(given)!r:.100}")
    weight, root = given.get("weight", 1.0), given.get("image_root")
    check_number("data.path: weight", weight, above=0, note=", how often an epoch reads each record")
    return WeightedSet(Path(given["path"]), None if root is None else Path(root), float(weight))


def read_meta(path: Path) -> list[WeightedSet] | None:
    """The sets of a meta file; None for a file that is none.

    Raises:
        ValueError: naming file and set for one without "annotation", or a "repeat_time" that is no
            number above 0.
    """
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > LARGEST:
        return None
    with path.open("rb") as file:
        if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
            return None
    try:
        sets = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not sets or not all(isinstance(one, Mapping) for one in sets.values()):
        return None
    if not any("annotation" in one for one in sets.values()):
        return None
    return [_weighted(path, name, Fields(one)) for name, one in sets.items()]


def _weighted(path: Path, name: str, fields: Fields) -> WeightedSet:
    annotation, root = fields.take("annotation"), fields.take("root")
    if not isinstance(annotation, str):
        raise ValueError(f"{path}: the set {name!r:.60} has no 'annotation', the file of its records")
    times = fields.take("repeat_time")
    times = 1 if times is None else times
    check_number(f"{path}: repeat_time of the set {name!r:.60}", times, above=0)
    if fields.given.get("data_augment") is False:
        fields.asked.add("data_augment")
    unread = tuple(f"key {key!r} of a set" for key in fields.unread())
    return WeightedSet(_found(path, annotation), None if root is None else _found(path, str(root)), float(times), unread)


def _found(meta: Path, given: str) -> Path:
    """A path of a meta file: from its folder on, or as InternVL from the current one."""
    beside = meta.parent / given
    return beside if beside.exists() or not Path(given).exists() else Path(given)
