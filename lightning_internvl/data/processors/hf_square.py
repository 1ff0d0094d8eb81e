"""Pictures as the image processors of transformers make squares of them for CLIP, SigLIP, DINO,
I-JEPA and others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from lightning_internvl.data.processors.basic import OneSquare, centre
from lightning_internvl.messages import check_choice

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
LONGEST_STRIP = 32  # sides of a picture that is enlarged whole


class HFSquare(OneSquare):
    """The whole picture squashed to a square, or the square in its middle.

    Args:
        image_size: S, side in pixels of what the encoder sees.
        mean, std: of the channels, on a scale from 0 to 1.
        zoom: how many times S the shorter side has before the square is cut out (CLIP: 1, DINOv2:
            256 / 224); None squashes the whole picture (SigLIP, I-JEPA, DINOv3).
        filter: that resizes, by Pillow.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        zoom: float | None = None,
        filter: str = "bicubic",  # noqa: A002 (the word of Pillow)
    ) -> None:
        super().__init__(image_size, mean, std)
        check_choice("data.processor.filter", filter, FILTERS)
        if zoom is not None and zoom < 1:
            raise ValueError(f"{zoom=} must be 1 or more: the square lies inside the picture")
        self.zoom, self.filter = zoom, FILTERS[filter]

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 -> (1, S, S, 3) uint8. Chance plays no part."""
        if self.zoom is None:
            return self._filtered(image, self.image_size, self.image_size)[None]
        # The ends of a strip fall away anyhow, and enlarged whole it would take gigabytes.
        longest = LONGEST_STRIP * min(image.shape[:2])
        image = centre(image, min(image.shape[0], longest), min(image.shape[1], longest))
        height, width = image.shape[:2]
        short, wanted = min(height, width), round(self.zoom * self.image_size)
        size = (int(wanted * width / short), int(wanted * height / short))
        return centre(self._filtered(image, *size), self.image_size, self.image_size)[None]

    def _filtered(self, image: np.ndarray, width: int, height: int) -> np.ndarray:
        if image.shape[:2] == (height, width):
            return image
        return np.asarray(Image.fromarray(image).resize((width, height), self.filter))
