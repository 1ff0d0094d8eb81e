"""Pictures with a class for every pixel: ADE20K's folders, and the built-in scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from lightning_internvl.data.files.images import SIDEWAYS, is_image_file, opened_image, read_image
from lightning_internvl.data.files.lazy_pictures import LazyPictures, evenly_spread

IGNORED = 255  # of pixels that are not judged
TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
        ValueError: naming the file, for a folder or an annotation that is missing or whose size is
            not its picture's, and when a mask is read, for one that cannot be read, is in colours,
            or holds a class that does not exist.
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
    annotations = [masks / f"{file.stem}.png" for file in chosen]
    turns = [_turn_of_mask(*pair) for pair in zip(chosen, annotations, strict=True)]

    def mask(place: int) -> np.ndarray:
        return read_mask(annotations[place], classes, reduce_zero_label, turns[place])

    return MaskedPictures(LazyPictures(chosen, read_image), mask, len(files))


def _turn_of_mask(picture: Path, annotation: Path) -> Image.Transpose | None:
    """How a mask is turned to lie on its picture, by headers alone. Pictures are turned upright by
    their EXIF tag; masks may have been drawn before or after.

    Raises:
        ValueError: if the mask cannot be read, or its size is that of the picture neither upright
            nor before it is turned, or both, so that no one knows.
    """
    with opened_image(annotation) as mask:
        drawn = mask.size
    try:
        with opened_image(picture) as image:
            size, tag = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    except ValueError:
        return None  # the task counts pictures that cannot be read
    turn, upright = TURNS.get(tag), size[::-1] if tag in SIDEWAYS else size
    if drawn not in (upright, size):
        raise ValueError(f"{picture} has {upright[0]} x {upright[1]} px, but its annotation {annotation} {drawn[0]} x {drawn[1]}")
    if turn is not None and upright == size:
        unknown = "its annotation would fit before and after the turn"
        raise ValueError(f"{picture} is turned by its EXIF tag, and {unknown}; save the picture upright, without the tag")
    return turn if drawn == size else None


def read_mask(path: Path, classes: int, reduce_zero_label: bool, turn: Image.Transpose | None = None) -> np.ndarray:
    """(H, W) uint8, turned where its picture is; raises ValueError as `read_mask_folder`."""
    with opened_image(path) as image:
        if image.mode not in ("L", "P", "1", "I;16", "I"):
            raise ValueError(f"{path} holds colours ({image.mode}), not the numbers of classes")
        found = np.array(image if turn is None else image.transpose(turn)).astype(np.int32)
    if reduce_zero_label:
        found = np.where(found == 0, IGNORED, np.where(found == IGNORED, IGNORED, found - 1))
    if (wrong := found[((found >= classes) & (found != IGNORED)) | (found < 0)]).size:
        found = wrong.max() + reduce_zero_label
        raise ValueError(f"{path} holds the class {found}, but {classes=} of them exist")
    return found.astype(np.uint8)
