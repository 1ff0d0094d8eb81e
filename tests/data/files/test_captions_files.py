"""Captions in the files of COCO and Flickr30K."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_internvl.data.files.captions import read_captions

COCO = {
    "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
    "annotations": [{"image_id": i, "caption": c} for i, c in ((3, "a one"), (7, "b one"), (3, "a two"))],
}
KARPATHY = {
    "images": [
        {"filename": "b.png", "split": "test", "sentences": [{"raw": "b one"}]},
        {"filename": "x.png", "split": "train", "sentences": [{"raw": "x"}]},
        {"filename": "a.png", "split": "test", "sentences": [{"raw": "a one"}, {"raw": "a two"}]},
    ]
}
TABLES = {
    "flickr.csv": "image,caption\nb.png,b one\na.png,a one\na.png,a two\n",
    "results.csv": "image_name| comment_number| comment\nb.png| 0| b one\na.png| 0| a one\na.png| 1| a two\n",
    "cc.tsv": "filepath\ttitle\nb.png\tb one\na.png\ta one\na.png\ta two\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    return tmp_path


def written(folder: Path, data: Any, name: str = "captions.json") -> Path:
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / name


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("captions_val.json", COCO),
        ("dataset.json", KARPATHY),
        ("karpathy.json", [{"image": "b.png", "caption": "b one"}, {"image": "a.png", "caption": ["a one", "a two"]}]),
        *TABLES.items(),
    ],
)
def test_every_layout_gives_the_same(folder: Path, name: str, data: Any) -> None:
    found = read_captions(written(folder, data, name))
    assert [path.name for path in found.paths] == ["b.png", "a.png"]
    assert found.captions == [["b one"], ["a one", "a two"]]
    assert [image.shape for image in found.images] == [(4, 4, 3)] * 2
    first = read_captions(folder / name, per_picture=1, samples=1)
    assert (first.captions, first.total) == ([["b one"]], 2)


def test_pictures_elsewhere_and_in_folders_of_their_own(folder: Path, tmp_path: Path) -> None:
    record = {"filepath": folder.name, "filename": "a.png", "split": "val", "sentences": [{"raw": "hello"}]}
    (tmp_path / "lists").mkdir()
    file = written(tmp_path / "lists", {"images": [record]}, "k.json")
    assert read_captions(file, images=folder.parent, split="val").paths == [folder / "a.png"]
    with pytest.raises(ValueError, match="lists no picture with a caption of the split 'test'"):
        read_captions(file, images=folder.parent)
    with pytest.raises(ValueError, match=r"the picture .*a.png is not in .*lists; say where pictures are with images=FOLDER"):
        read_captions(file, split="val")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "c.json",
            {**COCO, "annotations": COCO["annotations"][:1]},
            r"image 0 \(b.png\): there is no annotation with its id 7",
        ),
        ("c.json", {**COCO, "images": COCO["images"][:1]}, "annotations speak of the image 3, which is not among the images"),
        ("c.json", {**COCO, "annotations": [{"image_id": 3}]}, "c.json: annotation 0 has no 'caption'"),
        ("c.json", [{"image": "a.png", "caption": []}], r"c.json: record 0 \(a.png\) has no captions"),
        ("c.json", [{"image": "a.png", "caption": [" "]}, {}], "c.json: record 1 has no 'image'"),
        ("c.json", [{"image": "a.png", "caption": [{"raw": 3}]}], "record 0 .a.png.: raw is 3, not a text"),
        ("c.json", {"records": []}, "neither COCO's images and annotations"),
        ("c.json", "{", "c.json is no JSON"),
        ("c.csv", "image,caption\na.png,\n", "c.csv: line 2: caption is '', not a text"),
        ("c.csv", "one,two\n", "c.csv: its first line must name a column of pictures .* it names one, two"),
    ],
)
def test_faults_name_file_and_record(folder: Path, name: str, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_captions(written(folder, data, name))
