"""Reading pictures, and what is said when they are broken."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files import images as image_files
from lightning_internvl.data.files.images import IMAGE_SUFFIXES, is_image_file, read_image
from lightning_internvl.data.files.labelled_folder import FolderLabels
from lightning_internvl.data.files.mask_folder import read_mask_folder
from lightning_internvl.data.files.record_sources import open_records
from lightning_internvl.data.files.videos import read_video
from lightning_internvl.data.processors.basic import CenterCrop, RandomCrop, Squash, Tiles, choose_grid
from lightning_internvl.data.shards.records import pair_of
from lightning_internvl.data.shards.tables import ParquetShards
from lightning_internvl.data.shards.tar import TarShards
from lightning_internvl.evaluation.benchmark_files import pictures_by_number
from lightning_internvl.inference.picture_search import Gallery


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


DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">{}</svg>'
RED = DRAWING.format('<rect width="20" height="20" fill="red"/>')


@pytest.mark.parametrize("before", ["", "\ufeff", '<?xml version="1.0"?>\n<!-- a comment -->\n', "<!DOCTYPE svg>"])
def test_drawings_are_drawn(tmp_path: Path, before: str) -> None:
    (tmp_path / "a.svg").write_text(before + RED, encoding="utf-8")
    for source in (tmp_path / "a.svg", (tmp_path / "a.svg").read_bytes()):
        found = read_image(source)
        assert found.shape == (512, 1024, 3)
        assert found[256, 100].tolist() == [255, 0, 0]
        assert found[256, 900].tolist() == [255, 255, 255]
    assert is_image_file("A.SVG")


@pytest.mark.parametrize("element", ["image", "x:image", "feImage"])
def test_a_drawing_takes_in_no_other_file(picture: Path, element: str) -> None:
    for place in (str(picture), f"&#47;{str(picture)[1:]}", f" {picture}"):
        drawing = DRAWING.format(f"<{element} xlink:href = '{place}' width='40' height='20'/>")
        with pytest.raises(BadSample, match="an SVG that takes in another file is not read"):
            read_image(drawing.encode())


def test_a_damaged_drawing_is_a_bad_sample() -> None:
    for content in (RED[:-9].encode(), RED.encode("utf-8") + b"\xff", b"<?xml version='1.0'?><note>svg</note>"):
        with pytest.raises(BadSample, match="cannot be read") as caught:
            read_image(content)
        assert caught.value.kind == "unreadable image"


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\0" * 300, "it begins with zeros"),
        (b"\n<!DOCTYPE html><title>404</title>", "it is a web page, not a picture: '.n<!DOCTYPE html><title>404</title>'"),
        (b"GIF8 but no", "no known kind of picture, or its header is damaged; it begins with b'GIF8 but no'"),
        (b"\xff\xd8\xff\xe0", "no known kind of picture|truncated|EOF"),
    ],
)
def test_the_reason_why_a_file_is_no_picture(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for source in (content, tmp_path / "a.jpg"):
        with pytest.raises(BadSample, match=f"cannot be read: ({reason})") as caught:
            read_image(source)
        assert caught.value.kind == "unreadable image"


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "tiff", "bmp", "avif"])
def test_damaged_files_are_bad_samples_and_nothing_else(kind: str) -> None:
    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, kind)
    whole, bad = file.getvalue(), 0
    for number in range(60):
        content = bytearray(whole)
        for place in rng.integers(len(content) if number % 2 else 100, size=6):
            content[place] = rng.integers(256)
        with warnings.catch_warnings(action="ignore"):
            try:
                assert read_image(bytes(content[: rng.integers(len(content))] if number % 3 == 0 else content)).ndim == 3
            except BadSample:
                bad += 1
    assert bad > 5


def test_sixteen_bits_and_palettes_with_transparency() -> None:
    deep = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    assert read_image(encoded(Image.fromarray(deep), "png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    for mode, transparency in (("L", 7), ("P", 7), ("RGB", (7, 7, 7))):
        image = Image.new(mode, (2, 1), 9 if mode != "RGB" else (9, 9, 9))
        if mode == "P":
            image.putpalette([value for value in range(256) for _ in range(3)])
        image.putpixel((1, 0), transparency)
        pixels = read_image(encoded(image, "png", transparency=transparency))
        assert pixels.tolist() == [[[9, 9, 9], [255, 255, 255]]], mode


def test_large_jpegs_may_be_decoded_smaller() -> None:
    rows, columns = np.mgrid[:384, :512]
    picture = np.stack([rows / 2, columns / 2, 128 + 60 * np.sin(rows / 17) * np.cos(columns / 13)], -1).astype(np.uint8)
    content = encoded(Image.fromarray(picture), "jpeg", quality=95)
    shapes = {least: read_image(content, least=least).shape[:2] for least in (None, 385, 193, 192, 96, 48, 1)}
    assert shapes == {
        None: (384, 512),
        385: (384, 512),
        193: (384, 512),
        192: (192, 256),
        96: (96, 128),
        48: (48, 64),
        1: (48, 64),
    }
    whole, half = (Squash(96)(read_image(content, least=least)).astype(int) for least in (None, 192))
    assert np.abs(whole - half).mean() < 1
    assert read_image(encoded(Image.fromarray(picture), "png"), least=10).shape[:2] == (384, 512)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


CROOKED = {
    "1x1.png": lambda path: Image.new("RGB", (1, 1), (10, 20, 30)).save(path),
    "1x5000.png": lambda path: Image.new("RGB", (1, 5000), (10, 20, 30)).save(path),
    "5000x1.jpg": lambda path: Image.new("RGB", (5000, 1), (10, 20, 30)).save(path, quality=100, subsampling=0),
    "cmyk.jpg": lambda path: Image.new("RGB", (30, 20), (10, 20, 30)).convert("CMYK").save(path, quality=100, subsampling=0),
    "palette.png": lambda path: Image.new("RGB", (30, 20), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(path),
    "animated.gif": lambda path: save_frames(path),
    "animated.webp": lambda path: save_frames(path, lossless=True),
}


def save_frames(path: Path, **options: bool) -> None:
    """Two frames, of which only the first has the colour that is expected."""
    first, second = Image.new("RGB", (30, 20), (10, 20, 30)), Image.new("RGB", (30, 20), (200, 0, 0))
    first.save(path, save_all=True, append_images=[second], duration=50, **options)


@pytest.mark.parametrize("name", CROOKED)
def test_crooked_pictures_reach_the_encoder(tmp_path: Path, name: str) -> None:
    CROOKED[name](tmp_path / name)
    pixels = read_image(tmp_path / name)
    for squares in (Tiles(16)(pixels), Squash(16)(pixels), CenterCrop(16)(pixels), RandomCrop(16)(pixels, (1, 2))):
        assert squares.shape[1:] == (16, 16, 3)
        assert np.abs(squares.astype(int) - [10, 20, 30]).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_dark_sixteen_bits_stay_dark(suffix: str) -> None:
    for value, seen in ((200, 1), (65535, 255), (257 * 9, 9)):
        assert read_image(encoded(Image.fromarray(np.full((4, 6), value, dtype=np.uint16)), suffix)).max() == seen


def test_values_of_32_bits_by_the_rule_that_is_documented() -> None:
    def seen(values: list[float], kind: type) -> list[int]:
        return read_image(encoded(Image.fromarray(np.array([values], dtype=kind)), "tiff"))[0, :, 0].tolist()

    assert seen([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert seen([0, 0.5, 1, 200, 255], np.float32) == [0, 0, 1, 200, 255]
    assert seen([0, 1, 200], np.int32) == [0, 1, 200]
    for values, kind in (
        ([0, 256], np.float32),
        ([-0.1, 1], np.float32),
        ([np.nan], np.float32),
        ([np.inf], np.float32),
        ([300], np.int32),
    ):
        with pytest.raises(BadSample, match="from 0 to 255 are read, or floats from 0 to 1"):
            seen(values, kind)


def test_a_pipe_is_no_picture_and_no_shard(tmp_path: Path) -> None:
    for name in ("a.png", "a.tar", "a.parquet", "list.txt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(BadSample, match="no file, but a pipe or a device"):
        read_image(tmp_path / "a.png")
    for shards in (TarShards([tmp_path / "a.tar"] * 2), ParquetShards([tmp_path / "a.parquet"] * 2)):
        with pytest.raises(ValueError, match="no file, but a pipe or a device"):
            list(shards.read(0))
    with pytest.raises(ValueError, match="no file, but a pipe or a device"):
        TarShards(tmp_path / "list.txt")


def test_a_program_in_place_of_a_picture_is_not_started() -> None:
    with pytest.raises(BadSample, match="no known kind of picture"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")


def test_a_short_drawing_cannot_draw_for_hours() -> None:
    nested = '<g id="a0"><rect width="1" height="1"/></g>' + "".join(
        f'<g id="a{n}">' + f'<use href="#a{n - 1}"/>' * 10 + "</g>" for n in range(1, 9)
    )
    for inside in (nested, '<g id="a"><use href="#a"/></g>'):
        with pytest.raises(BadSample, match="draws more than 10000 shapes"):
            read_image(DRAWING.format(inside).encode())


def test_a_turned_picture_is_tiled_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert choose_grid(*read_image(tmp_path / "a.jpg").shape[1::-1], 16, 1, 4) == (1, 2)


@pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".TIF"])
def test_a_picture_of_every_kind_is_read_wherever_folders_are(tmp_path: Path, suffix: str) -> None:
    """By training on captions, on classes and on videos, by evaluation, and by the search of `chat.py images=FOLDER`."""
    folder = tmp_path / "a"
    for place in (folder, tmp_path / "images" / "val", tmp_path / "annotations" / "val"):
        place.mkdir(parents=True)
    for place in (folder, tmp_path / "images" / "val"):
        if suffix == ".svg":
            (place / "cat_7.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="8" height="6"/>')
        else:
            Image.new("RGB", (8, 6), "red").save(place / f"cat_7{suffix}", Image.registered_extensions()[suffix.lower()])
    height, width = (768, 1024) if suffix == ".svg" else (6, 8)  # drawings have no size of their own
    Image.new("L", (width, height), 1).save(tmp_path / "annotations" / "val" / "cat_7.png")
    (folder / "cat_7.txt").write_text("a cat")
    (captioned,) = open_records(folder)
    assert captioned.read(0)[0] == {"image": f"cat_7{suffix}", "caption": "a cat"}
    assert FolderLabels(tmp_path).files()[0][0] == f"a/cat_7{suffix}"
    assert read_mask_folder(tmp_path, "val", 2).total == 1
    assert read_video(folder)[0].shape == (1, height, width, 3)
    assert pictures_by_number(folder) == {7: folder / f"cat_7{suffix}"}
    assert Gallery(folder, Colours()).paths == [folder / f"cat_7{suffix}"]
    record = {"key": "7", suffix.lower().removeprefix("."): (folder / f"cat_7{suffix}").read_bytes(), "txt": "a cat"}
    assert read_image(pair_of(record)["image"]).shape == (height, width, 3)


class Colours:
    """A retriever without a model."""

    batch_size = 4

    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """The first colour of each picture."""
        return torch.stack([torch.from_numpy(image[:1, 0] / 255.0) for image in images])
