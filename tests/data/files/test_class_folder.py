"""Folders of labelled pictures with the names of their classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lightning_internvl.data.files.class_folder import read_class_folder, read_names
from lightning_internvl.data.files.lazy_pictures import THREADS, LazyPictures, evenly_spread

FOLDERS = ("n01", "n02", "n10")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, name in enumerate(FOLDERS):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (5, 4), (place, number, 0)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_all_pictures_or_some_of_every_class(folder: Path) -> None:
    data = read_class_folder(folder)
    assert (data.names, data.labels, data.total) == (list(FOLDERS), [0] * 4 + [1] * 4 + [2] * 4, 12)
    assert [tuple(image[0, 0]) for image in data.images] == [(place, number, 0) for place in range(3) for number in range(4)]
    few = read_class_folder(folder, samples=3)
    assert (few.labels, few.total, len(few.images)) == ([0, 1, 2], 12, 3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "tench\ngold fish\nshark\n"),
        ("map.txt", "n02 gold fish, Carassius\nn01 tench, Tinca tinca\nn10 shark\nn99 nothing\n"),
        ("list.json", '["tench", "gold fish", "shark"]'),
        ("dict.json", '{"n10": "shark", "n01": "tench", "n02": "gold fish"}'),
        ("index.json", '{"0": ["n01", "tench"], "1": ["n02", "gold_fish"], "9": ["n10", "shark"]}'),
    ],
)
def test_names_of_classes(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_names(tmp_path / name, FOLDERS) == ["tench", "gold fish", "shark"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.txt", "a\nb\n", "names.txt holds 2 names, but there are 3 folders"),
        ("names.json", json.dumps({"n01": "a", "n02": ""}), r"no name for the class 'n02' \(2 of 3 lack one\)"),
        ("names.json", json.dumps([1, 2, 3]), "no name for the class 'n01'"),
        ("names.json", "{", "names.json is no json file"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_names(tmp_path / name, FOLDERS)


def test_folders_without_classes(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="holds 0 folders, one a class; classes are told apart from two on"):
        read_class_folder(folder / "n01")
    with pytest.raises(ValueError, match=r"nowhere.txt: there is no such file of class names"):
        read_class_folder(folder, tmp_path / "nowhere.txt")


def test_pictures_are_read_when_asked_for_and_in_order() -> None:
    read: list[int] = []

    def picture(item: int) -> int:
        read.append(item)
        return item

    pictures = LazyPictures(range(1000), picture)
    part = pictures[100:900]
    assert (len(part), read) == (800, [])
    walk = iter(part)
    assert [next(walk) for _ in range(3)] == [100, 101, 102]
    assert len(read) <= 100 + 8 * THREADS  # and not all 800
    assert part[-1] == 899
    assert evenly_spread(10, 4) == [0, 3, 6, 9]
    assert evenly_spread(3, 7) == evenly_spread(3, None) == [0, 1, 2]
    with pytest.raises(ValueError, match="samples=0"):
        evenly_spread(3, 0)


def numbered(folder: Path, numbers: list[str]) -> Path:
    for number in numbers:
        (folder / number).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / number / "a.png")
    return folder


@pytest.mark.parametrize(("first", "width"), [(0, 1), (1, 1), (0, 4)])
@pytest.mark.parametrize("kind", ["lines", "list", "by folder", "by number", "folder and name"])
def test_folders_that_are_numbers_follow_them(tmp_path: Path, first: int, width: int, kind: str) -> None:
    numbers = [f"{first + place:0{width}}" for place in range(12)]
    said = [f"thing {chr(97 + place)}" for place in range(12)]
    texts = {
        "lines": "\ufeff" + "\n".join(said),
        "list": json.dumps(said),
        "by folder": json.dumps(dict(zip(numbers, said, strict=True))),
        "by number": json.dumps({str(int(n)): [f"n{n}", name.replace(" ", "_")] for n, name in zip(numbers, said, strict=True)}),
        "folder and name": "\n".join(f"{n} {name}, and more" for n, name in zip(numbers, said, strict=True)),
    }
    file = tmp_path / f"names.{'txt' if kind in ('lines', 'folder and name') else 'json'}"
    file.write_text(texts[kind], encoding="utf-8")
    data = read_class_folder(numbered(tmp_path / "set", numbers), file)
    assert data.names == said
    assert [path.parent.name for path in data.images.items] == numbers


@pytest.mark.parametrize(
    ("folders", "text", "fault"),
    [
        (["0", "1", "3"], "a\nb\nc", "3 folders have numbers from 0 to 3, not from 0 or 1 on without a gap; give {folder: name}"),
        (
            ["cat", "dog_house", "elk"],
            "Cat\nelk\ndog house",
            "'elk' would be the name of the folder 'dog_house', which is name 3",
        ),
        (["n01", "n02", "n03"], "n01 tench\nn02 goldfish\nn04 shark", "no name for the class 'n03'"),
    ],
)
def test_names_that_are_of_other_folders_are_refused(tmp_path: Path, folders: list[str], text: str, fault: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(fault)):
        read_names(tmp_path / "names.txt", folders)
