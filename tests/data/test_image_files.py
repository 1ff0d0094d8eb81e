"""Reading pictures, and what is said when they are broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data import image_files
from lightning_internvl.data.image_files import read_image
from lightning_internvl.data.processors import CenterCrop, RandomCrop, Squash, Tiles, choose_grid


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


def test_a_turned_picture_is_tiled_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert choose_grid(*read_image(tmp_path / "a.jpg").shape[1::-1], 16, 1, 4) == (1, 2)
