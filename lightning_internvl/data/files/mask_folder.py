"""Pictures with a class for every pixel: ADE20K's folders, and the built-in scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_internvl.data.files.images import DAMAGED, is_image_file, read_image
from lightning_internvl.data.files.lazy_pictures import LazyPictures, evenly_spread

IGNORED = 255  # of pixels that are not judged


@dataclass(frozen=True)
class MaskedPictures:
    """`images`, `mask(place)` (H, W) uint8 with classes from 0 on or IGNORED, and how many pictures
    there are in all."""

    images: LazyPictures
    mask: Callable[[int], np.ndarray]
    total: int


def read_mask_folder(
    path: str | Path, split: str, classes: int, reduce_zero_label: bool = True, samples: int | None = None
) -> MaskedPictures:
    """`path/images/<split>/*.jpg` with `path/annotations/<split>/*.png`, as ADE20K is kept.

    Args:
        classes: how many there are.
        reduce_zero_label: 0 stands for no class, and classes are counted from 1 on (ADE20K).
        samples: only that many pictures, spread over all.

    Raises:
        ValueError: naming the file, for a folder or an annotation that is missing, and when a mask
            is read, for one that cannot be read, is in colours, or holds a class that does not
            exist.
    """
    images, masks = (Path(path) / kind / split for kind in ("images", "annotations"))
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"{path} is not kept as ADE20K is: the folder {folder} does not exist")
    files = sorted(file for file in images.iterdir() if is_image_file(file))
    if not files:
        raise ValueError(f"{images} holds no picture")
    there = {file.stem for file in masks.iterdir() if file.suffix.lower() == ".png"}
    if missing := [file for file in files if file.stem not in there]:
        lacking = f"{len(missing)} of {len(files)} pictures lack one"
        wanted = f"{masks / missing[0].stem}.png"
        raise ValueError(f"{missing[0]} has no annotation: {wanted} does not exist ({lacking})")
    chosen = [files[place] for place in evenly_spread(len(files), samples)]

    def mask(place: int) -> np.ndarray:
        return read_mask(masks / f"{chosen[place].stem}.png", classes, reduce_zero_label)

    return MaskedPictures(LazyPictures(chosen, read_image), mask, len(files))


def read_mask(path: Path, classes: int, reduce_zero_label: bool) -> np.ndarray:
    """(H, W) uint8; raises ValueError as `read_mask_folder`."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1", "I;16", "I"):
                raise ValueError(f"{path} holds colours ({image.mode}), not the numbers of classes")
            found = np.array(image).astype(np.int64)
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if reduce_zero_label:
        found = np.where(found == 0, IGNORED, np.where(found == IGNORED, IGNORED, found - 1))
    if (wrong := found[(found >= classes) & (found != IGNORED)]).size:
        found = wrong.max() + reduce_zero_label
        raise ValueError(f"{path} holds the class {found}, but {classes=} of them exist")
    return found.astype(np.uint8)
