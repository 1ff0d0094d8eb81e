"""Pictures from files: one reader with clear errors, and image-caption pairs listed in a JSONL, CSV or TSV file."""

from __future__ import annotations

import csv
import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

MAX_PIXELS = 89_478_485  # the size from which Pillow warns of a decompression bomb
SEPARATORS = {".jsonl": None, ".csv": ",", ".tsv": "\t"}


def read_image(path: str | Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB: turned upright by its EXIF tag, transparency over white, any mode.

    Raises ValueError naming the file when it is missing, unreadable, cut off or over MAX_PIXELS.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image {path} does not exist")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"image {path} has {image.width} x {image.height} px, more than {MAX_PIXELS} in all")
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {path} is larger than {MAX_PIXELS} px: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        deep = image.mode != "F" and values.max(initial=0) > 255
        return Image.fromarray(np.clip(values / 257 if deep else values, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class ImageFolderPairs(Dataset[dict[str, Any]]):
    """{"image": (S, S, 3) uint8, "caption", "language", "key"} from a list of {image, caption[, language]} records.

    `path` is a .jsonl, .csv or .tsv file with one record a line (CSV and TSV start with a header line); image paths
    are relative to its folder. Pictures are squashed to a square by bicubic resizing. Only the byte offset of each line
    is held, and read at the first access. Raises ValueError naming file and line for a record that cannot be used.
    """

    def __init__(self, path: str | Path, image_size: int, language: str = "en") -> None:
        self.path, self.image_size, self.language = Path(path), image_size, language
        if self.path.suffix not in SEPARATORS:
            raise ValueError(f"{path}: unknown kind of list {self.path.suffix!r}; choose from {list(SEPARATORS)}")
        if not self.path.is_file():
            raise ValueError(f"list of images {path} does not exist")
        self.separator = SEPARATORS[self.path.suffix]
        self._lines: tuple[array, array] | None = None  # byte offsets, line numbers
        self._columns: list[str] = []

    def __len__(self) -> int:
        return len(self._index()[0])

    def __getitem__(self, position: int) -> dict[str, Any]:
        offsets, numbers = self._index()
        if not 0 <= position < len(offsets):
            raise IndexError(f"sample {position} of {len(offsets)}")
        with self.path.open("rb") as file:
            file.seek(offsets[position])
            line = file.readline()
        where = f"{self.path}, line {numbers[position]}"
        try:
            record = self._parse(line.decode("utf-8-sig"))
            name, caption = str(record["image"] or ""), str(record["caption"] or "").strip()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: not a record with image and caption: {error!r}") from error
        if not name or not caption:
            raise ValueError(f"{where}: the {'caption' if name else 'image'} is empty")
        try:
            pixels = read_image(self.path.parent / name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        size = (self.image_size, self.image_size)
        image = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        language = record.get("language") or self.language
        key = f"{self.path.name}:{numbers[position]}"
        return {"image": image, "caption": caption, "language": language, "key": key}

    def _parse(self, line: str) -> dict[str, Any]:
        if self.separator is None:
            return json.loads(line)
        return dict(zip(self._columns, next(csv.reader([line], delimiter=self.separator)), strict=True))

    def _index(self) -> tuple[array, array]:
        if self._lines is None:
            offsets, numbers, offset = array("q"), array("q"), 0
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if self.separator is not None and number == 1:
                        self._columns = next(csv.reader([line.decode("utf-8-sig")], delimiter=self.separator))
                    elif line.strip():
                        offsets.append(offset)
                        numbers.append(number)
                    offset += len(line)
            self._lines = offsets, numbers
        return self._lines
