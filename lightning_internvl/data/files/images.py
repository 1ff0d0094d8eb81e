"""Pictures from files: one reader with clear errors."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.svg import is_svg, svg_to_png
from lightning_internvl.files import check_no_device

# Files with these endings are pictures, in folders and in shards; of several pictures in a record
# the first kind counts.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".svg")

MAX_PIXELS = 89_478_485  # the size from which Pillow warns of a decompression bomb
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow's decoders raise on damaged files, beside its own errors.
DAMAGED = (
    UnidentifiedImageError, OSError, SyntaxError, EOFError, struct.error, zlib.error, LookupError,
    TypeError, RuntimeError, ArithmeticError, AttributeError, ValueError, MemoryError, AssertionError,
)  # fmt: skip
# What is looked for in a file, whatever its name; Pillow knows others that start programs (EPS) or
# take nearly any bytes for a picture (TGA).
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000", "ICO", "PCX",
)  # fmt: skip
WHITE_OF_16_BITS = 65535
WEB_PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<script")
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}
TAIL = 32  # bytes in which that mark stands
SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that change width and height
SHOWN = 40  # bytes of a file that is no picture, in messages
HEAD = 2000  # bytes of a file that tell whether it is a drawing


def is_image_file(path: str | Path) -> bool:
    """Whether a file's name ends as those of pictures do, in upper or lower case."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(source: str | Path | bytes, least: int | None = None) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB: turned upright by its EXIF tag, transparency over white,
    any mode, the first of several; of a drawing (SVG) 1024 pixels on its longer side.

    Args:
        source: a path, or the bytes of a file.
        least: a JPEG is decoded at a half, quarter or eighth of its size, the smallest of which
            both sides are `least` or more. Its decoder averages blocks where a resize would filter:
            at twice the size that is wanted in the end, values differ by about 1 of 255. None: at
            its own size.

    Raises:
        ValueError: naming the file when it is missing, unreadable, cut off or over MAX_PIXELS.
    """
    with opened_image(source) as image:
        if least is not None:
            image.draft(None, (least, least))
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(to_rgb(image))


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Width and height of the upright picture as its header tells. A file that does not end as its
    kind does is decoded, because it may be cut off. Raises ValueError as `read_image`."""
    with opened_image(source) as image:
        width, height = image.size
        # The tags of a PNG may stand behind its pixels, and would be looked for there
        tagged = image.format != "PNG" or "exif" in image.info
        turned = tagged and image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
        if not _is_whole(image):
            image.load()
    return (height, width) if turned else (width, height)


def _is_whole(image: Image.Image) -> bool:
    """Whether the file of an opened picture ends with the mark of its kind; true for kinds without
    one."""
    file: BinaryIO | None = getattr(image, "fp", None)  # which a format may have closed
    if file is None or image.format not in ENDS:
        return True
    place = file.tell()
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - TAIL))
    found = ENDS[image.format] in file.read()
    file.seek(place)
    return found


@contextmanager
def opened_image(source: str | Path | bytes) -> Iterator[Image.Image]:
    """A picture whose pixels are not read yet; faults of reading them inside are told as
    `read_image` does."""
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else source
    try:
        if not isinstance(source, bytes):
            check_no_device(source)
        # The file is opened here, because Pillow leaves it open where it fails.
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
            Image.open(_pixels(file), formats=FORMATS) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} px"
                raise BadSample(f"image {name} has {size}, more than {MAX_PIXELS} in all", "large image")
            yield image
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BadSample(f"image {name} does not exist", "missing image") from error
    except TOO_LARGE as error:
        raise BadSample(f"image {name} is larger than {MAX_PIXELS} px: {error}", "large image") from error
    except BadSample:
        raise
    except DAMAGED as error:
        raise BadSample(f"image {name} cannot be read: {_reason(source, error)}", "unreadable image") from error


def _pixels(file: BinaryIO) -> BinaryIO:
    """A file that Pillow reads: of a drawing one with its pixels."""
    head = file.read(HEAD)
    file.seek(0)
    return io.BytesIO(svg_to_png(file.read())) if is_svg(head) else file


def _reason(source: str | Path | bytes, error: Exception) -> str:
    """What is wrong with a file, in words; Pillow just cannot identify strange ones."""
    if not isinstance(error, UnidentifiedImageError):
        return str(error) or type(error).__name__
    if isinstance(source, bytes):
        head = source[:SHOWN]
    else:
        with open(source, "rb") as file:
            head = file.read(SHOWN)
    if not head.strip(b"\0"):
        return "it is empty" if not head else "it begins with zeros"
    if head.lstrip().lower().startswith(WEB_PAGES):
        return f"it is a web page, not a picture: {head.decode('utf-8', 'replace')!r}"
    return f"no known kind of picture, or its header is damaged; it begins with {head!r}"


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, with white behind what is transparent."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values of more bits as (H, W) uint8, by the format's white: 65535 of 16 bits. Formats of
    32 bits have none: floats up to 1 are from 0 to 1, all others are from 0 to 255.

    Raises:
        ValueError: for values of 32 bits beyond these.
    """
    values = np.asarray(image).astype(np.float32)
    if image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")):
        if isinstance(clear := image.info.get("transparency"), int):
            values[values == clear] = WHITE_OF_16_BITS  # as what is seen through is
        return np.rint(values / (WHITE_OF_16_BITS / 255)).clip(0, 255).astype(np.uint8)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= 255):
        kind = "floats" if image.mode == "F" else "whole numbers of 32 bits"
        raise ValueError(f"its {kind} go from {low:g} to {high:g}; from 0 to 255 are read, or floats from 0 to 1")
    return np.rint(values * 255 if image.mode == "F" and high <= 1 else values).astype(np.uint8)
