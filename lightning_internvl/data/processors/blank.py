"""Pictures of their shapes alone, for checks of what training would make of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_internvl.data.processors.basic import Processor


class BlankPictures:
    """A processor whose pictures have the shapes of another one's, and no memory: nothing is
    resized. Everything else is that of the other one."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 -> uint8 zeros of the shape that the processor gives. Raises ValueError
        as it does."""
        return blank(self.processor.shape(*image.shape[:2]))

    def whole(self) -> BlankPictures:
        """As the processor's."""
        return BlankPictures(self.processor.whole())

    def shared(self, pictures: int) -> BlankPictures:
        """As the processor's."""
        found = self.processor.shared(pictures)
        return self if found is self.processor else BlankPictures(found)

    def asked(self, pictures: int) -> BlankPictures:
        """As the processor's."""
        found = self.processor.asked(pictures)
        return self if found is self.processor else BlankPictures(found)


@functools.lru_cache(maxsize=4096)
def blank(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros of a shape, uint8, all of them in one byte."""
    return np.broadcast_to(np.zeros((), dtype=np.uint8), shape)
