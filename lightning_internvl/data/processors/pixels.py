"""Pictures as bytes and as the values that an encoder reads."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

from lightning_internvl.layers.attention_masks import on_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_gives_bytes: ContextVar[bool] = ContextVar("gives_bytes", default=False)


@contextmanager
def as_bytes() -> Iterator[None]:
    """Inside, processors give pictures as bytes, a quarter of the size, for a way that ends with
    `Processor.normalised`: from process to process, and from the host to the device."""
    token = _gives_bytes.set(True)
    try:
        yield
    finally:
        _gives_bytes.reset(token)


def gives_bytes() -> bool:
    """Whether pictures are wanted as bytes."""
    return _gives_bytes.get()


def to_pixels(
    images: np.ndarray | Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise (B, H, W, 3) uint8 to (B, 3, H, W) float32: (value / 255 - mean) / std per channel;
    into `out` if it is given."""
    pixels = to_tensor(images)
    count, height, width, channels = pixels.shape
    values = pixels.new_empty((count, channels, height, width), dtype=torch.float32) if out is None else out
    # On the host one picture at a time, which stays in the cache of the processor
    step = 1 if values.device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        part = pixels[start : start + step].permute(0, 3, 1, 2).contiguous()
        normalise_channels(values[start : start + step].copy_(part), mean, std)
    return values


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """Pictures as a tensor, which knows neither memory that is read only nor steps backwards."""
    if isinstance(images, Tensor):
        return images
    return torch.from_numpy(np.require(images, requirements=["C_CONTIGUOUS", "WRITEABLE"]))


def normalise_channels(values_B3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Values from 0 to 255 to (value / 255 - mean) / std, in place; the same bits on any device."""
    scale, shift = _factors(tuple(mean), tuple(std), values_B3HW.device)
    return values_B3HW.mul_(scale).sub_(shift)


@functools.cache
def _factors(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """1 / (255 std) and mean / std by channel (3, 1, 1), moved to a device once."""
    means, stds = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    return on_device(1 / (255 * stds), device), on_device(means / stds, device)
