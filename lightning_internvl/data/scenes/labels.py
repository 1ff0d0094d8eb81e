"""Labelled pictures of single things, drawn on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from lightning_internvl.data.scenes.generator import Scenes
from lightning_internvl.data.scenes.things import THINGS

ENDLESS = 2**40
HELD_OUT = len(THINGS) * 2**15  # the first single things are for measuring


class SceneLabels(Dataset[dict[str, Any]]):
    """One thing alone on a background; the things take turns. None of the pictures is among those
    that are measured.

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

    def identity(self) -> None:
        """Its settings say all."""

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < self.length:
            raise IndexError(f"sample {position} of {self.length}")
        scene = self.scenes.scene(HELD_OUT + position)
        return {"image": self.scenes.render(scene), "label": scene.objects[0].thing, "key": f"single/{HELD_OUT + position}"}
