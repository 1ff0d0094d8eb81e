"""JPEG of a random quality, as augmentation: pictures from the web have been compressed before
(InternVL 2.5, section 3.3; official `dataset.py`, `simulate_jpeg_degradation`)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

STREAM = 1  # keeps these draws apart from a processor's own


def recompressed(squares: np.ndarray, quality: Sequence[int], draw: Sequence[int]) -> np.ndarray:
    """(n, H, W, 3) uint8 -> the same after JPEG, each of a quality drawn from `quality`, the least
    and the most; `draw` fixes the chance."""
    rng = np.random.default_rng([*draw, STREAM])
    return np.stack([_through_jpeg(one, int(rng.integers(quality[0], quality[1] + 1))) for one in squares])


def _through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))
