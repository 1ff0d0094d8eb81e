"""Reading pictures and lists of pictures, and what is said when they are broken."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data import image_files
from lightning_internvl.data.image_files import ImageFolderPairs, read_image


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_every_mode(tmp_path: Path, mode: str) -> None:
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "F": "tiff", "I": "tiff"}.get(mode, "png")
    path = tmp_path / f"a.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.full((4, 6), 65535 // 2, dtype=np.uint16)).save(path)
    else:
        Image.new("L", (6, 4), 128).convert(mode).save(path)
    pixels = read_image(path)
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    if mode != "1":
        assert np.abs(pixels.astype(int) - 128).max() <= 2


def test_transparency_becomes_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 255).all()


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (30, 20, 3)


def test_unreadable_images(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:900])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_image(tmp_path / name)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 500)
    with pytest.raises(ValueError, match=r"a\.png has 30 x 20 px"):
        read_image(picture)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png is larger"):
        read_image(picture)


def write_list(path: Path, records: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n\n" for record in records), "utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["image", "caption"], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_pairs(picture: Path, suffix: str) -> None:
    records = [{"image": "a.png", "caption": text} for text in ("one, \"two\"", "两只猫", "three")]  # fmt: skip
    data = ImageFolderPairs(write_list(picture.parent / f"list.{suffix}", records), image_size=16)
    assert len(data) == 3
    assert [data[i]["caption"] for i in (2, 0, 1)] == ["three", 'one, "two"', "两只猫"]
    assert data[1]["image"].shape == (16, 16, 3)
    assert data[1]["key"] == ("list.jsonl:3" if suffix == "jsonl" else f"list.{suffix}:3")
    with pytest.raises(IndexError):
        data[3]


def test_broken_records_name_file_and_line(picture: Path) -> None:
    path = picture.parent / "list.jsonl"
    lines = ['{"image": "a.png", "caption": " "}', '{"image": "b.png", "caption": "x"}', '{"image": "a.png"}', "{"]
    path.write_text("\n".join(lines))
    data = ImageFolderPairs(path, image_size=16)
    reasons = ["line 1: the caption is empty", "line 2: image .*b.png does not exist", "line 3: .*caption", "line 4: "]
    for position, reason in enumerate(reasons):
        with pytest.raises(ValueError, match=rf"list\.jsonl, {reason}"):
            data[position]
    with pytest.raises(ValueError, match=r"'\.txt'.*jsonl"):
        ImageFolderPairs(picture.parent / "list.txt", 16)
    with pytest.raises(ValueError, match="does not exist"):
        ImageFolderPairs(picture.parent / "none.csv", 16)
