"""Labelled pictures for probes: single things from the built-in artwork, and folders with one class each.

Their samples are {"image": (H, W, 3) uint8, "label", "key"}.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_internvl.data.collation import Prepared, Sample, picture_keys, pixels_of, tiles_of
from lightning_internvl.data.held_out import LabelledImages
from lightning_internvl.data.image_files import read_image
from lightning_internvl.data.pictures import Pictures, spread
from lightning_internvl.data.processors import Processor
from lightning_internvl.data.prompts import prompts as class_prompts
from lightning_internvl.data.scenes import Scenes
from lightning_internvl.data.things import THINGS

ENDLESS = 2**40
HELD_OUT = len(THINGS) * 2**15  # the first single things are for measuring
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


class SceneLabels(Dataset[dict[str, Any]]):
    """One thing alone on a background; the things take turns. None of the pictures is among those that are measured.

    Args:
        classes: how many classes the probe has; it must be the number of things.
        length: None is endless.
    """

    def __init__(
        self,
        seed: int,
        classes: int,
        image_size: int = 64,
        styles: Sequence[str] = ("twemoji", "openmoji"),
        length: int | None = None,
    ) -> None:
        if classes != len(THINGS):
            raise ValueError(f"the built-in scenes show {len(THINGS)} things, but {classes=}")
        self.scenes = Scenes(seed, "single", image_size, tuple(styles))
        self.length = ENDLESS if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < self.length:
            raise IndexError(f"sample {position} of {self.length}")
        scene = self.scenes.scene(HELD_OUT + position)
        return {"image": self.scenes.render(scene), "label": scene.objects[0].thing, "key": f"single/{HELD_OUT + position}"}


class FolderLabels(Dataset[dict[str, Any]]):
    """Pictures in one folder a class, as ImageNet is kept: `path/<class>/<any depth>/<picture>`.

    Classes are numbered in the order of their names. Files are listed at the first access.

    Args:
        classes: how many classes the probe has; it must be the number of folders. None takes any number.

    Raises:
        ValueError: for a folder that is missing or has another number of classes, and for a picture that cannot be read.
    """

    def __init__(self, path: str | Path, classes: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"folder of pictures {path} does not exist")
        self.names = sorted(entry.name for entry in self.path.iterdir() if entry.is_dir())
        if classes is not None and len(self.names) != classes:
            raise ValueError(f"{path} holds {len(self.names)} folders, one a class, but {classes=}")
        self._files: tuple[list[str], array] | None = None  # relative paths, classes

    def __len__(self) -> int:
        return len(self.files()[0])

    def __getitem__(self, position: int) -> dict[str, Any]:
        files, labels = self.files()
        name = files[position]
        return {"image": read_image(self.path / name), "label": labels[position], "key": name}

    def files(self) -> tuple[list[str], array]:
        """The pictures by their paths below the folder, and the class of each."""
        if self._files is None:
            files, labels = [], array("i")
            for label, name in enumerate(self.names):
                found = sorted(p for p in (self.path / name).rglob("*") if p.suffix.lower() in SUFFIXES)
                if not found:
                    raise ValueError(f"{self.path / name} holds no picture; known kinds: {', '.join(sorted(SUFFIXES))}")
                files += [str(p.relative_to(self.path)) for p in found]
                labels.extend([label] * len(found))
            self._files = files, labels
        return self._files


class HeldOutFolder:
    """The pictures of a second folder, on which a probe is measured.

    Args:
        path, classes: as in `FolderLabels`.
        single: how many pictures are read, spread over all classes; None reads all.
        prompts: what is said about a class for zero-shot naming, a set of `lightning_internvl.data.prompts`; the names of the
            classes are those of the folders.
        scenes, questions: sizes of other held-out data, which `debug=fast` sets whatever the data; a folder has none.
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

    def labelled(self) -> LabelledImages:
        """The pictures, read as they are asked for, their classes, and the prompts of every class."""
        _, labels = self.data.files()
        said = class_prompts(self.data.names, self.prompts)
        places = spread(len(labels), self.single or None)
        return LabelledImages(Pictures(places, self._picture), [labels[place] for place in places], said)

    def _picture(self, place: int) -> np.ndarray:
        return self.data[place]["image"]


class LabelCollator:
    """Samples with labels to `pixel_values` (B, 3, S, S) float32, `labels` (B,) int64 and `keys`."""

    picture_keys = False  # whether batches name their pictures (see `feature_cache`)

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.stack([self.prepare(sample) for sample in samples])

    def prepare(self, sample: Sample) -> Prepared:
        """The square of one picture. Raises ValueError naming the sample."""
        tiles = tiles_of(self.processor, sample["image"], sample["key"], sample.get("draw"))
        return {"key": sample["key"], "tiles": tiles, "label": sample["label"]}

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """A batch of prepared pictures."""
        return {
            "keys": [one["key"] for one in prepared],
            "pixel_values": pixels_of(self.processor, [one["tiles"] for one in prepared]),
            **picture_keys(prepared, self.picture_keys),
            "labels": torch.tensor([one["label"] for one in prepared]),
        }

    def blank(self, batch_size: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """A batch without data: what the memory of a step is measured with."""
        side = self.processor.image_size
        return {
            "pixel_values": torch.zeros(batch_size, 3, side, side, device=device),
            "labels": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }

    def pixels(
        self, images: Sequence[np.ndarray], keys: Sequence[str], draws: Sequence[Sequence[int] | None] | None = None
    ) -> Tensor:
        """Pictures of any size to (B, 3, S, S) float32; `draws` fixes the chance of each (see `Processor`)."""
        found = zip(images, keys, draws or [None] * len(images), strict=True)
        return pixels_of(self.processor, [tiles_of(self.processor, image, key, draw) for image, key, draw in found])
