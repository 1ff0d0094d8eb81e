"""Padded squares beside transformers' own processors, and both sizes of a pair."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_internvl.data.processors.basic import CLIP_MEAN, CLIP_STD
from lightning_internvl.data.processors.padded import PaddedPair, PaddedSquare

SIZES = [(60, 60), (100, 37), (31, 200), (3, 300), (45, 44), (17, 16)]
HALF = (0.5, 0.5, 0.5)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def theirs(kind: str, **settings: Any) -> Any:
    module = import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    name = {"deepseek_vl": "DeepseekVLImageProcessorPil", "deepseek_vl_hybrid": "DeepseekVLHybridImageProcessorPil"}[kind]
    return getattr(module, name)(**settings)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mean", [HALF, CLIP_MEAN], ids=["half", "clip"])
def test_pixels_are_those_of_transformers(size: tuple[int, int], mean: tuple[float, ...]) -> None:
    image = picture(*size)
    processor = PaddedSquare(48, mean, CLIP_STD, nearest=True)
    reference = theirs("deepseek_vl", size={"height": 48, "width": 48}, image_mean=list(mean), image_std=list(CLIP_STD))
    expected = reference(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor.inputs([processor(image)])["pixel_values"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_sizes_are_those_of_transformers(size: tuple[int, int]) -> None:
    image = picture(*size)
    processor = PaddedPair(32, 64, HALF, HALF, CLIP_MEAN, CLIP_STD, nearest=True, low_filter="bicubic")
    reference = theirs(
        "deepseek_vl_hybrid", size={"height": 32, "width": 32}, high_res_size={"height": 64, "width": 64}, image_mean=list(HALF),
        image_std=list(HALF), high_res_image_mean=list(CLIP_MEAN), high_res_image_std=list(CLIP_STD),
    )  # fmt: skip
    expected, found = reference(Image.fromarray(image), return_tensors="pt"), processor.inputs([processor(image)])
    assert found.keys() == {"pixel_values", "high_res_pixel_values"}
    for name, pixels in found.items():
        torch.testing.assert_close(pixels, expected[name], rtol=0, atol=1e-5)


def test_the_shorter_side_is_cut_off_as_in_the_original() -> None:
    image = np.full((37, 100, 3), 9, dtype=np.uint8)  # 37 / 100 * 48 = 17.76
    rows = {n: int((PaddedSquare(48, nearest=n)(image)[0, :, 0, 0] == 9).sum()) for n in (False, True)}
    assert rows == {False: 17, True: 18}
    assert (PaddedSquare(48)(image)[0, 0] == 127).all()
    assert tuple(PaddedPair(24, 48, 0 * np.ones(3), np.ones(3))(image)[0, 0, 0]) == (122, 116, 104)
    thin = PaddedSquare(48)(np.full((1, 500, 3), 9, dtype=np.uint8))
    assert int((thin[0, :, 0, 0] == 9).sum()) == 14


def test_no_pictures_and_blank_ones() -> None:
    processor = PaddedPair(16, 32)
    sides = {"pixel_values": 16, "high_res_pixel_values": 32}
    for inputs, count in ((processor.inputs([]), 0), (processor.blank(3), 3)):
        assert {name: x.shape for name, x in inputs.items()} == {name: (count, 3, side, side) for name, side in sides.items()}
    assert type(processor.whole()) is PaddedSquare
    with pytest.raises(ValueError, match="low_filter='nearest' is not known; valid choices: bilinear, bicubic"):
        PaddedPair(16, 32, low_filter="nearest")
