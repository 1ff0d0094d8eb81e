"""Labelled pictures for probes: single built-in things, and folders of one class each.

Their samples are {"image": (H, W, 3) uint8, "label", "key"}.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.class_prompts import prompts as class_prompts
from lightning_internvl.data.files.images import IMAGE_SUFFIXES, is_image_file, read_image
from lightning_internvl.data.files.lazy_pictures import LazyPictures, Pictures, evenly_spread
from lightning_internvl.files import state_of


class FolderLabels(Dataset[dict[str, Any]]):
    """Pictures in one folder a class, as ImageNet is kept: `path/<class>/<any depth>/<picture>`.

    Classes are numbered in the order of their names; names that are all numbers (ImageNet-V2), in the
    order of these. Files are listed at the first access.

    Args:
        classes: how many classes the probe has; it must be the number of folders. None takes any
            number.

    Raises:
        ValueError: for a folder that is missing or has another number of classes, and for a picture
            that cannot be read.
    """

    def __init__(self, path: str | Path, classes: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"folder of pictures {path} does not exist")
        self.names = class_order(entry.name for entry in self.path.iterdir() if entry.is_dir())
        if classes is not None and len(self.names) != classes:
            raise ValueError(f"{path} holds {len(self.names)} folders, one a class, but {classes=}")
        self._files: tuple[list[str], array] | None = None  # relative paths, classes

    def __len__(self) -> int:
        return len(self.files()[0])

    def __getitem__(self, position: int) -> dict[str, Any]:
        files, labels = self.files()
        name = files[position]
        try:
            return {"image": read_image(self.path / name), "label": labels[position], "key": name}
        except BadSample as error:
            raise BadSample(str(error), error.kind, name) from error.__cause__

    def identity(self) -> str:
        """Names, sizes and times of all pictures."""
        return state_of(self.path / name for name in self.files()[0])

    def files(self) -> tuple[list[str], array]:
        """The pictures by their paths below the folder, and the class of each."""
        if self._files is None:
            files, labels = [], array("i")
            for label, name in enumerate(self.names):
                found = sorted(p for p in (self.path / name).rglob("*") if is_image_file(p))
                if not found:
                    known = ", ".join(IMAGE_SUFFIXES)
                    raise ValueError(f"{self.path / name} holds no picture; known kinds: {known}")
                files += [str(p.relative_to(self.path)) for p in found]
                labels.extend([label] * len(found))
            self._files = files, labels
        return self._files


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their numbers: 2 before 10 where all of them are numbers."""
    known = sorted(names)
    return sorted(known, key=int) if all(name.isdecimal() for name in known) else known


class HeldOutFolder:
    """The pictures of a second folder, on which a probe is measured.

    Args:
        path, classes: as in `FolderLabels`.
        single: how many pictures are read, spread over all classes; None reads all.
        prompts: what is said about a class for zero-shot naming, a set of
            `lightning_internvl.data.files.class_prompts`; the names of the classes are those of the
            folders.
        scenes, questions: sizes of other held-out data, which `debug=fast` sets whatever the data;
            a folder has none.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        classes: int,
        single: int | None = None,
        scenes: int | None = None,
        questions: int | None = None,
        prompts: str = "imagenet",
    ) -> None:
        self.data, self.single, self.prompts = FolderLabels(path, classes), single, prompts

    def identity(self) -> str:
        """Names, sizes and times of all pictures."""
        return self.data.identity()

    def labelled(self) -> LabelledImages:
        """The pictures, read when asked for, their classes, and the prompts of each."""
        _, labels = self.data.files()
        said = class_prompts(self.data.names, self.prompts)
        places = evenly_spread(len(labels), self.single or None)
        images = LazyPictures(places, self._picture)
        return LabelledImages(images, [labels[place] for place in places], said)

    def _picture(self, place: int) -> np.ndarray:
        return self.data[place]["image"]


@dataclass(frozen=True)
class LabelledImages:
    """`images` (N, S, S, 3) uint8, the class of each, and for every class its prompts."""

    images: Pictures
    labels: list[int]
    prompts: list[list[str]]
