"""Scenes with a mask of classes."""

from __future__ import annotations

import numpy as np

from lightning_internvl.data.files.lazy_pictures import LazyPictures
from lightning_internvl.data.files.mask_folder import MaskedPictures
from lightning_internvl.data.scenes.generator import Scenes
from lightning_internvl.data.scenes.things import THINGS

SCENE_CLASSES = 1 + len(THINGS)  # the background first


def scene_masks(scenes: Scenes, samples: int) -> MaskedPictures:
    """The first scenes of a split."""

    def picture(place: int) -> np.ndarray:
        return scenes.render(scenes.scene(place))

    pictures = LazyPictures(range(samples), picture)
    return MaskedPictures(pictures, lambda place: scenes.mask(scenes.scene(place)), samples)
