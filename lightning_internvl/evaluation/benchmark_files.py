"""Files of public sets: JSON and JSON lines, and pictures by name or number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.data.files.images import is_image_file

SHOWN = 12  # names of what a file holds, in messages


def read_object(path: Path, key: str) -> list[dict[str, Any]]:
    """The list under one key of a JSON file.

    Raises:
        ValueError: if it is no such file.
    """
    found = read_whole(path)
    if not isinstance(found, Mapping) or not isinstance(found.get(key), list):
        raise ValueError(f"{path} holds no list of {key!r}; it holds {_holds(found)}")
    return found[key]


def read_list(path: Path) -> list[dict[str, Any]]:
    """A JSON file that is one list of records.

    Raises:
        ValueError: if it is no such file.
    """
    found = read_whole(path)
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise ValueError(f"{path} is no list of records; it holds {_holds(found)}")
    return found


def says(path: Path, key: str, value: str) -> bool:
    """Whether a JSON file has an object with this text, in upper or lower case, under a key."""
    found = read_whole(path) if path.is_file() and path.suffix == ".json" else None
    return isinstance(found, Mapping) and str(found.get(key)).lower() == value


def read_whole(path: Path) -> Any:
    """What a JSON file holds; raises ValueError if it is none."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _holds(found: Any) -> str:
    if isinstance(found, Mapping):
        names = list(map(str, found))
        return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return "a list" if isinstance(found, list) else f"{type(found).__name__} {str(found)[:60]!r}"


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file of JSON lines, each with its place ("FILE:LINE").

    Raises:
        ValueError: for a line that is no record.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _record(line, f"{path}:{number}")


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} is no record of names and values, but {line.strip()[:60]!r}")
    return found


def field(record: Mapping[str, Any], names: tuple[str, ...], place: str) -> Any:
    """The first of several names that a record has.

    Raises:
        ValueError: if it has none, with those that it has.
    """
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(f"{place} has no {' or '.join(map(repr, names))}; it has {', '.join(map(repr, record))}")


def pictures_by_number(folder: Path) -> dict[int, Path]:
    """Pictures by the last number in their name, as COCO_val2014_000000000042.jpg is picture 42."""
    found = {}
    for path in sorted(folder.iterdir()):
        if is_image_file(path) and (number := re.search(r"(\d+)$", path.stem)):
            found[int(number[1])] = path
    return found


def picture_in(folder: Path, name: str) -> Path:
    """A picture by its path in a set's file, which may begin at a folder above: the longest end of
    it that is there, else the whole of it below `folder`."""
    parts = Path(name).parts
    tails = (folder.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((path for path in tails if path.is_file()), folder / name)
