"""Pictures that questions show: files, pictures inside a table of a set, and what draws one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lightning_internvl.data.files.images import read_image


@dataclass(frozen=True)
class StoredPicture:
    """A picture inside a table, as parquet and TSV files of public sets keep them.

    Attributes:
        place: names it, "FILE, row N, COLUMN"; no other has the same.
        content: reads the bytes of its file.
    """

    place: str
    content: Callable[[], bytes] = field(compare=False)

    def look(self) -> np.ndarray:
        """(H, W, 3) uint8; raises ValueError naming its place where it cannot be read."""
        try:
            return read_image(self.content())
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from error


Picture = Path | StoredPicture | Callable[[], np.ndarray]


def look_at(picture: Picture) -> np.ndarray:
    """(H, W, 3) uint8; raises ValueError for a file that is no picture."""
    if isinstance(picture, StoredPicture):
        return picture.look()
    return read_image(picture) if isinstance(picture, Path) else picture()


def digest_of_picture(picture: Picture) -> str | None:
    """A digest of what a picture's file holds, empty where it cannot be read; None of one that is
    drawn."""
    try:
        if isinstance(picture, StoredPicture):
            return hashlib.blake2b(picture.content(), digest_size=16).hexdigest()
        if isinstance(picture, Path):
            with picture.open("rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (OSError, ValueError):
        return ""  # what reads the picture says what is wrong with it
    return None
