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
    """The pictures of `path/<class>/`, classes in the order of `labelled_folder.class_order`.

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
        folders: names of the classes' folders, in their order. Where all are numbers that do not
            follow each other from 0 or 1 on, names must say to which they belong.

    Raises:
        ValueError: naming the file and the first class without a name, or whose name is that of
            another folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of class names")
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = path.suffix == ".json"
        found = _names_of_json(json.loads(text), folders) if is_json else _names_of_lines(text, folders)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no {path.suffix.removeprefix('.') or 'text'} file: {error}") from error
    if isinstance(found, list):
        if len(found) != len(folders):
            held = f"{len(found)} names, but there are {len(folders)} folders"
            raise ValueError(f"{path} holds {held}, one a class")
        _check_order(path, found, folders)
        found = dict(zip(folders, found, strict=True))
    if missing := [x for x in folders if not isinstance(found.get(x), str) or not found[x]]:
        lacking = f"{len(missing)} of {len(folders)} lack one"
        raise ValueError(f"{path} has no name for the class {missing[0]!r} ({lacking})")
    return [found[folder] for folder in folders]


def _names_of_lines(text: str, folders: Sequence[str]) -> list[str] | dict[str, str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = [line.split(maxsplit=1) for line in lines]
    named = {words[0]: words[1].partition(",")[0].strip() for words in first if len(words) == 2}
    return _by_folder(named, folders) if 2 * len(set(named) & set(folders)) > len(folders) else lines


def _names_of_json(found: Any, folders: Sequence[str]) -> list[Any] | dict[str, Any]:
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        return []
    if found and all(isinstance(pair, list) and len(pair) == 2 for pair in found.values()):
        named = {x: name.replace("_", " ") if isinstance(name, str) else None for x, name in found.values()}
        numbered = {number: named[x] for number, (x, _) in found.items()}
        return _by_folder(numbered if all(folder.isdecimal() for folder in folders) else named, folders)
    return _by_folder(found, folders)


def _by_folder(named: dict[str, Any], folders: Sequence[str]) -> dict[str, Any]:
    """Names by folder; folder 007 is number 7."""
    numbers = {int(key): name for key, name in named.items() if key.isdecimal()}
    return {x: named.get(x, numbers.get(int(x)) if x.isdecimal() else None) for x in folders}


def _check_order(path: Path, names: Sequence[Any], folders: Sequence[str]) -> None:
    """Refuse a list whose order cannot be that of the folders."""
    if all(folder.isdecimal() for folder in folders):
        numbers = [int(folder) for folder in folders]
        if numbers not in (list(range(len(numbers))), list(range(1, len(numbers) + 1))):
            held = f"{len(numbers)} folders have numbers from {numbers[0]} to {numbers[-1]}, not from 0 or 1 on without a gap"
            raise ValueError(f"{path} is a list, but {held}; give {{folder: name}} as JSON, or FOLDER NAME lines")
    said = {_plain(name): place for place, name in enumerate(names)}
    for place, folder in enumerate(folders):
        if said.get(_plain(folder), place) != place:
            other = f"{names[place]!r} would be the name of the folder {folder!r}, which is name {said[_plain(folder)] + 1}"
            raise ValueError(f"{path}: {other} of the list; give {{folder: name}} as JSON, or names in the order of the folders")


def _plain(name: Any) -> str:
    return str(name).casefold().replace("_", " ").strip()
