"""Pictures in one folder a class, as ImageNet is kept, with names for the classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_internvl.data.files.images import read_image
from lightning_internvl.data.files.labelled_folder import FolderLabels
from lightning_internvl.data.files.lazy_pictures import LazyPictures, Pictures, evenly_spread


@dataclass(frozen=True)
class NamedPictures:
    """`images`, the class of each, the names of the classes, and the pictures in all."""

    images: Pictures
    labels: list[int]
    names: list[str]
    total: int


def read_class_folder(path: str | Path, names: str | Path | None = None, samples: int | None = None) -> NamedPictures:
    """The pictures of `path/<class>/`, classes in the order of their folders' names.

    Args:
        names: a file of names (see `read_names`); None: the names of the folders.
        samples: only that many pictures, spread over all classes.

    Raises:
        ValueError: for a folder that is missing or has fewer than two classes, a class without
            pictures, names that do not fit.
    """
    data = FolderLabels(path)
    if len(data.names) < 2:
        held = f"{len(data.names)} folders, one a class"
        raise ValueError(f"{path} holds {held}; classes are told apart from two on")
    said = read_names(names, data.names) if names else data.names
    files, labels = data.files()
    places = evenly_spread(len(files), samples)
    images = LazyPictures([data.path / files[place] for place in places], read_image)
    return NamedPictures(images, [labels[place] for place in places], said, len(files))


def read_names(path: str | Path, folders: Sequence[str]) -> list[str]:
    """The name of each class.

    Args:
        path: a text with a name a line, in the order of the folders; or with lines of a folder, a
            blank and its names, of which the first before a comma counts ("n01440764 tench, Tinca
            tinca"); or JSON: a list in that order, {folder: name}, or {number: [folder, name]}.
        folders: names of the classes' folders, in their order.

    Raises:
        ValueError: naming the file and the first class without a name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of class names")
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        found = _names_of_json(json.loads(text)) if is_json else _names_of_lines(text, folders)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no {path.suffix.removeprefix('.') or 'text'} file: {error}") from error
    if isinstance(found, list):
        if len(found) != len(folders):
            held = f"{len(found)} names, but there are {len(folders)} folders"
            raise ValueError(f"{path} holds {held}, one a class")
        found = dict(zip(folders, found, strict=True))
    if missing := [x for x in folders if not isinstance(found.get(x), str) or not found[x]]:
        lacking = f"{len(missing)} of {len(folders)} lack one"
        raise ValueError(f"{path} has no name for the class {missing[0]!r} ({lacking})")
    return [found[folder] for folder in folders]


def _names_of_lines(text: str, folders: Sequence[str]) -> list[str] | dict[str, str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = [line.split(maxsplit=1) for line in lines]
    if {words[0] for words in first} >= set(folders) and all(len(words) == 2 for words in first):
        return {folder: names.partition(",")[0].strip() for folder, names in first}
    return lines


def _names_of_json(found: Any) -> list[Any] | dict[str, Any]:
    if isinstance(found, list):
        return found
    pairs = found.values() if isinstance(found, dict) else []
    if pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return {x: name.replace("_", " ") if isinstance(name, str) else None for x, name in pairs}
    return found if isinstance(found, dict) else []
