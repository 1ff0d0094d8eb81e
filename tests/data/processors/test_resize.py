"""Resizing by PyTorch beside Pillow, and what processors make of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.processors.basic import CenterCrop, Processor, RandomCrop, Squash, Tiles
from lightning_internvl.data.processors.padded import PadSquare
from lightning_internvl.data.processors.pixels import to_pixels
from lightning_internvl.data.processors.resize import resized

MAKERS = [Squash, CenterCrop, RandomCrop, Tiles, PadSquare, AnyResolution]


def photo(height: int, width: int) -> np.ndarray:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    smooth = [127 + 90 * np.sin(rows / a + columns / b) for a, b in ((31, 23), (17, 41), (13, 11))]
    return np.clip(np.stack(smooth, -1) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "sizes",  # height and width before and after; Pillow begins with either direction
    [
        (480, 640, 448, 448),
        (500, 447, 448, 448),
        (300, 200, 150, 190),
        (90, 110, 224, 224),
        (640, 480, 112, 224),
        (31, 700, 31, 64),
    ],
)
def test_both_kernels_give_nearly_the_same(sizes: tuple[int, int, int, int]) -> None:
    image = photo(*sizes[:2])
    gaps = [
        np.abs(resized(x, sizes[3], sizes[2], "torch").astype(int) - resized(x, sizes[3], sizes[2]))
        for x in (image, image[:, ::-1])
    ]
    for gap in gaps:
        assert (gap > 0).mean() < 0.01
        assert gap.max() <= 2
    assert resized(image, sizes[1], sizes[0], "torch") is image


@pytest.mark.parametrize("maker", MAKERS)
def test_processors_use_the_kernel_asked_for(maker: type[Processor], recwarn: pytest.WarningsRecorder) -> None:
    image = photo(100, 140)
    image.flags.writeable = False
    options = {"patch_size": 14} if maker is AnyResolution else {}
    exact, fast = (maker(56, resize=kernel, **options) for kernel in ("pillow", "torch"))
    one, other = exact(image, (1, 2)), fast(image, (1, 2))
    assert one.shape == other.shape
    assert 0 < (one != other).mean() < 0.02
    assert fast.whole().resize == "torch"
    for processor in (exact, fast):
        values = processor.inputs([processor(image), processor(image[:, ::-1])])["pixel_values"]
        assert values.dtype == torch.float32
    assert not recwarn.list
    with pytest.raises(ValueError, match="resize='cv2' is not known; valid choices: pillow, torch"):
        maker(56, resize="cv2")


def test_pictures_are_normalised_in_their_places() -> None:
    squares = [photo(8, 8)[None], np.stack([photo(8, 8)] * 3)[:, ::-1], photo(8, 8)[None][:, :, ::-1]]
    values = Squash(8).inputs(squares)["pixel_values"]
    assert torch.equal(values, to_pixels(np.concatenate(squares)))
    assert Squash(8).inputs([])["pixel_values"].shape == (0, 3, 8, 8)
