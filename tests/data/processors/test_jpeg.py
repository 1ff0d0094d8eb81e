"""JPEG of a random quality in training, for every processor."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from published import fresh

from lightning_internvl.data.collate.base import tiles_of
from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.processors.basic import CenterCrop, Processor, RandomCrop, Squash, Tiles
from lightning_internvl.data.processors.jpeg import recompressed
from lightning_internvl.data.processors.padded import PaddedPair, PaddedSquare, PadSquare

PICTURE = np.random.default_rng(0).integers(0, 256, (70, 150, 3), dtype=np.uint8)
PROCESSORS: dict[str, tuple[type[Processor], dict[str, Any]]] = {
    "squash": (Squash, {}), "crop": (CenterCrop, {}), "random crop": (RandomCrop, {}), "tiles": (Tiles, {"max_tiles": 4}),
    "pad": (PadSquare, {}), "padded": (PaddedSquare, {}), "pair": (PaddedPair, {"high_image_size": 112}),
    "any": (AnyResolution, {"min_pixels": 784}),
}  # fmt: skip


def through_pillow(picture: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=quality)
    return np.array(Image.open(stream))


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_takes_it_and_chance_alone_turns_it_on(name: str) -> None:
    kind, options = PROCESSORS[name]
    plain, jpeg = kind(56, **options), kind(56, **options)
    jpeg.jpeg_quality = [20, 40]
    assert np.array_equal(tiles_of(jpeg, PICTURE, "k"), plain(PICTURE))
    before, after = tiles_of(plain, PICTURE, "k", (0, 3)), tiles_of(jpeg, PICTURE, "k", (0, 3))
    assert before.shape == after.shape
    assert after.dtype == np.uint8
    assert not np.array_equal(before, after)
    assert np.array_equal(after, tiles_of(jpeg, PICTURE, "k", (0, 3)))
    assert {key: x.shape for key, x in jpeg.inputs([after]).items()} == {
        key: x.shape for key, x in plain.inputs([before]).items()
    }


def test_qualities_are_drawn_evenly_and_each_square_has_its_own() -> None:
    squares = np.broadcast_to(PICTURE[:40, :40], (4, 40, 40, 3))
    by_quality = {through_pillow(squares[0], quality).tobytes(): quality for quality in range(75, 101)}
    drawn = [[by_quality[one.tobytes()] for one in recompressed(squares, [75, 100], (0, place))] for place in range(300)]
    counts = np.bincount(np.ravel(drawn), minlength=101)[75:]
    assert counts.min() > 0.4 * counts.mean()  # 46 of each are expected, with a deviation of 7
    assert counts.max() < 1.6 * counts.mean()
    assert any(len(set(one)) > 1 for one in drawn)


def test_a_crop_stays_where_it_is_drawn() -> None:
    plain, jpeg = RandomCrop(56, scale=(0.2, 0.3)), RandomCrop(56, scale=(0.2, 0.3))
    jpeg.jpeg_quality = [100, 100]
    smooth = np.add.outer(np.arange(150), np.arange(150))[..., None].repeat(3, 2).astype(np.uint8) // 2
    for place in range(5):
        before, after = tiles_of(plain, smooth, "k", (0, place)), tiles_of(jpeg, smooth, "k", (0, place))
        assert np.abs(before.astype(int) - after).mean() < 2


@pytest.mark.parametrize("recipe", ["internvl_1_5_toy", "internvl_toy"])
def test_training_has_it_and_measurement_has_not(recipe: str) -> None:
    view, _ = fresh(recipe, ["data.jpeg_quality=[75,100]"])
    assert view.training.processor.jpeg_quality == [75, 100]
    assert view.chats.processor.jpeg_quality is None
    if view.pairs is not None:
        assert view.pairs.processor.jpeg_quality is None
