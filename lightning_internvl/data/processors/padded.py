"""Pictures whole and in their proportions, on a square of one colour: DeepSeek-VL (official
`image_processing_vlm.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_internvl.data.processors.basic import BICUBIC, CLIP_MEAN, CLIP_STD, OneSquare, Processor, Size
from lightning_internvl.data.processors.pixels import to_pixels
from lightning_internvl.data.processors.resize import resized
from lightning_internvl.messages import check_choice

HALF = (0.5, 0.5, 0.5)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": BICUBIC}


class PaddedSquare(OneSquare):
    """The longest side resized to S, centred on a square of the mean colour.

    Args:
        min_side: the shorter side is never made smaller than this.
        nearest: the shorter side is rounded to the nearest pixel, as transformers does; the
            original cuts it off.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        min_side: int = 14,
        nearest: bool = False,
    ) -> None:
        super().__init__(image_size, mean, std)
        self.min_side, self.nearest = min(min_side, image_size), nearest
        self.colour = tuple(int(255 * value) for value in self.mean)

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        side, longest = self.image_size, max(image.shape[:2])
        # In the order of operations of each, which decides halves.
        if self.nearest:
            sides = [round(length * (side / longest)) for length in image.shape[:2]]
        else:
            sides = [int(length / longest * side) for length in image.shape[:2]]
        height, width = (max(length, self.min_side) for length in sides)
        return centred(resized(image, width, height), side, side, self.colour)[None]


class PaddedPair(PaddedSquare):
    """Two sizes of a picture, for an encoder of two towers: `high_res_pixel_values`, and
    `pixel_values` made from it.

    Args:
        image_size, mean, std: of the small size. The square has the mean colour of the large one.
        high_image_size, high_mean, high_std: of the large size.
        low_filter: how the small one is made: bilinear (original) or bicubic (transformers).
    """

    gives = ("high_res_pixel_values",)  # beside the small size

    def __init__(
        self,
        image_size: int,
        high_image_size: int,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        high_mean: Sequence[float] = CLIP_MEAN,
        high_std: Sequence[float] = CLIP_STD,
        min_side: int = 14,
        nearest: bool = False,
        low_filter: str = "bilinear",
    ) -> None:
        super().__init__(image_size, mean, std, min_side, nearest)
        check_choice("low_filter", low_filter, FILTERS)
        self.high = PaddedSquare(high_image_size, high_mean, high_std, min_side, nearest)
        self.low_filter = low_filter

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 -> (1, S', S', 3) uint8, the large size; `inputs` makes the small one."""
        return self.high(image)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.high.shape(height, width)

    def whole(self) -> Processor:
        """The small size alone."""
        return PaddedSquare(self.image_size, self.mean, self.std, self.min_side, self.nearest)

    def inputs(self, pictures: Sequence[np.ndarray], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """Both sizes of pictures as `__call__` returned them."""
        size = (self.image_size, self.image_size)
        kind = FILTERS[self.low_filter]
        small = [np.asarray(Image.fromarray(p[0]).resize(size, kind)) for p in pictures]
        low = super().inputs([picture[None] for picture in small])
        return {**low, "high_res_pixel_values": self.high.inputs(pictures)["pixel_values"]}

    def _values(self, name: str, pixels: Tensor) -> Tensor:
        own = self.high if name == "high_res_pixel_values" else self
        return to_pixels(pixels, own.mean, own.std)

    def blank(self, squares: int, device: str | torch.device = "cpu") -> dict[str, Any]:
        """Both sizes of as many empty pictures."""
        high = self.high.blank(squares, device)["pixel_values"]
        return {**super().blank(squares, device), "high_res_pixel_values": high}


def centred(image: np.ndarray, height: int, width: int, colour: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8 with the picture in the middle of `colour`; of an
    odd difference the smaller part comes first."""
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    found = np.full((height, width, 3), colour, dtype=np.uint8)
    found[top : top + image.shape[0], left : left + image.shape[1]] = image
    return found


class PadSquare(OneSquare):
    """The whole picture in the middle of a square of one colour, resized to S.

    Args:
        image_size, mean, std, resize: as in `Processor`.
        colour: red, green and blue of the border, 0 to 255; None: the mean of the channels, rounded
            down, which is close to zero once normalised (LLaVA 1.5). XComposer2 uses black in its
            benchmarks.
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
        """(H, W, 3) uint8 -> (L, L, 3) with the longer side L."""
        longest = max(image.shape[:2])
        return centred(image, longest, longest, self.colour)
