"""Pictures made square by a border instead of by squashing or cutting (LLaVA 1.5; official `mm_utils.expand2square`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_internvl.data.processors import CLIP_MEAN, CLIP_STD, Processor


class PadSquare(Processor):
    """The whole picture in the middle of a square of one colour, resized to S.

    Args:
        image_size, mean, std, resize: as in `Processor`.
        colour: red, green and blue of the border, 0 to 255; None: the mean of the channels, rounded down, which is close to zero
            once normalised (LLaVA 1.5). XComposer2 uses black in its benchmarks.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        colour: Sequence[int] | None = None,
        resize: str = "pillow",
    ) -> None:
        super().__init__(image_size, mean, std, resize)
        self.colour = tuple(int(255 * m) for m in self.mean) if colour is None else tuple(colour)
        if len(self.colour) != 3 or not all(0 <= value <= 255 for value in self.colour):
            raise ValueError(f"the border needs red, green and blue from 0 to 255: {colour=}")

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        return self._resized(self.square(image))[None]

    def square(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (L, L, 3) with the longer side L; of an odd difference the smaller part comes first."""
        height, width = image.shape[:2]
        if height == width:
            return image
        longer = max(height, width)
        top, left = (longer - height) // 2, (longer - width) // 2
        padded = np.full((longer, longer, 3), self.colour, dtype=np.uint8)
        padded[top : top + height, left : left + width] = image
        return padded
