"""Pictures for the vision towers of transformers: the pixels of its own image processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lightning_internvl.config.hf_pictures import FACTS, picture_fact, picture_size
from lightning_internvl.data.processors.hf_square import HFSquare
from lightning_internvl.messages import ConfigError

PROCESSORS: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
    "siglip": SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=2),
    "ijepa": ViTImageProcessorPil(size={"height": 28, "width": 28}),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("sides", [(40, 61), (90, 33), (28, 28)])
def test_pixels_are_those_of_transformers(name: str, sides: tuple[int, int], tmp_path: Path) -> None:
    theirs = PROCESSORS[name]
    theirs.save_pretrained(tmp_path)
    ours = HFSquare(28, **{fact: picture_fact(str(tmp_path), fact) for fact in FACTS})
    picture = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    expected = theirs(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.inputs([ours(picture)])["pixel_values"], expected, atol=2e-6, rtol=0)


def test_sizes_are_read_from_the_tower_or_the_model_around_it(tmp_path: Path) -> None:
    for config, side in (
        ({"image_size": 30}, 30),
        ({"vision_config": {"image_size": 336}}, 336),
        ({"num_patches": 256, "patch_size": 16}, 256),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert picture_size(str(tmp_path), {}) == side
    assert picture_size(None, {"image_size": 28}) == 28


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    facts = [picture_fact(str(tmp_path), fact) for fact in FACTS]
    assert facts == [[0.5] * 3, [0.5] * 3, None, "bicubic"]


@pytest.mark.parametrize(
    ("place", "message"),
    [("/nowhere", "there is no such folder; give one, or a hub id"), (None, "give encoder.image_size=PIXELS")],
)
def test_places_without_a_size(place: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        picture_size(place, {})


def test_files_that_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        picture_size(str(tmp_path), {})
    with pytest.raises(ConfigError, match=r"processor=hf prepares .* choose another"):
        picture_fact("none", "mean")
    with pytest.raises(ConfigError, match=r"'sdt' is no fact of pictures; did you mean 'std'"):
        picture_fact(None, "sdt")


def test_settings_that_do_not_fit() -> None:
    half = [0.5] * 3
    with pytest.raises(ValueError, match=r"filter='box' is not known; valid choices: nearest"):
        HFSquare(28, half, half, filter="box")
    with pytest.raises(ValueError, match=r"zoom=0\.5 must be 1 or more"):
        HFSquare(28, half, half, zoom=0.5)
    assert HFSquare(28, half, half, zoom=1.0)(np.zeros((4, 4000, 3), np.uint8)).shape == (1, 28, 28, 3)
