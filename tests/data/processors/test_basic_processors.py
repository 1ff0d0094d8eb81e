"""From a picture of any size to what the encoder sees."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.processors.basic import CenterCrop, RandomCrop, Squash, Tiles, choose_grid, grids


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def test_squash_changes_nothing_of_the_right_size() -> None:
    image = picture(16, 16)
    assert np.array_equal(Squash(16)(image), image[None])
    assert np.array_equal(Squash(16)(picture(20, 33))[0], resized(picture(20, 33), 16, 16))


@pytest.mark.parametrize("shape", [(16, 16), (20, 33), (33, 21), (3, 4), (16, 400)])
def test_centre_crop_is_the_middle_of_the_resized_picture(shape: tuple[int, int]) -> None:
    image, short = picture(*shape), min(shape)
    whole = resized(image, int(16 * shape[1] / short), int(16 * shape[0] / short))
    top, left = (whole.shape[0] - 16) // 2, (whole.shape[1] - 16) // 2
    assert np.array_equal(CenterCrop(16)(image)[0], whole[top : top + 16, left : left + 16])


def test_a_random_crop_depends_on_its_draw_alone() -> None:
    crop, image = RandomCrop(16, flip=True), picture(40, 60)
    assert np.array_equal(
        RandomCrop(16, resize="torch")(image), Squash(16)(image)
    )  # evaluation is exact, whatever training takes
    seen = {crop(image, (0, place)).tobytes() for place in range(20)}
    assert len(seen) == 20
    np.random.seed(1)
    assert crop(image, (0, 7)).tobytes() == RandomCrop(16, flip=True)(image, (0, 7)).tobytes()
    assert crop(image, (0, 7)).tobytes() != crop(image, (1, 7)).tobytes()
    assert np.array_equal(crop(image), Squash(16)(image))


def test_random_crops_keep_to_their_range() -> None:
    ramp = np.zeros((100, 200, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[:, None], np.arange(200)
    mirrored = 0
    for place in range(200):
        part = RandomCrop(64, scale=(0.5, 1.0), flip=True)._part(ramp, np.random.default_rng(place))
        assert 0.49 <= part.shape[0] * part.shape[1] / ramp[..., 0].size <= 1
        assert 0.74 <= part.shape[1] / part.shape[0] <= 1.35
        shown = RandomCrop(64, flip=True)(ramp, (place,))[0, 32, :, 1].astype(int)
        mirrored += shown[0] > shown[-1]
        assert RandomCrop(64)(ramp, (place,))[0, 32, 0, 1] < RandomCrop(64)(ramp, (place,))[0, 32, -1, 1]
    assert 70 < mirrored < 130


@pytest.mark.parametrize(("most", "number"), [(12, 35), (40, 158)])
def test_number_of_grids(most: int, number: int) -> None:
    assert len(grids(1, most)) == number


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((800, 800), (2, 2)),  # exactly as square as one tile, and more than half of four
        ((600, 600), (1, 1)),
        ((1344, 448), (3, 1)),
        ((1, 5000), (1, 12)),
        ((5000, 1), (12, 1)),
        ((896, 672), (4, 3)),
    ],
)  # fmt: skip
def test_grids(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert choose_grid(*size, 448, 1, 12) == grid


def test_tiles_are_in_reading_order_and_the_thumbnail_is_last() -> None:
    image = picture(20, 60)
    tiles = Tiles(8, max_tiles=3)(image)
    whole = resized(image, 24, 8)
    assert tiles.shape == (4, 8, 8, 3)
    assert all(np.array_equal(tiles[i], whole[:, 8 * i : 8 * i + 8]) for i in range(3))
    assert np.array_equal(tiles[3], resized(image, 8, 8))
    assert np.array_equal(Tiles(8, max_tiles=3, thumbnail=False)(image), tiles[:3])
    assert np.array_equal(Tiles(8, max_tiles=3).whole()(image), tiles[3:])
    assert Tiles(8)(picture(8, 8)).shape == (1, 8, 8, 3)
    grid = Tiles(8, min_tiles=4, max_tiles=4)(picture(16, 16))
    assert np.array_equal(np.block([[[grid[0]], [grid[1]]], [[grid[2]], [grid[3]]]]), picture(16, 16))


def test_the_worst_case_is_reached_and_never_exceeded() -> None:
    for processor in (Tiles(4), Tiles(4, max_tiles=1), Tiles(4, min_tiles=3, max_tiles=6, thumbnail=False), CenterCrop(4)):
        counts = {len(processor(picture(h, w))) for h, w in ((1, 100), (100, 1), (10, 10), (30, 40), (4, 4))}
        assert max(counts) == processor.max_tiles


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"min_tiles=3, max_tiles=2"):
        Tiles(8, min_tiles=3, max_tiles=2)
    with pytest.raises(ValueError, match=r"scale=\(0.5, 2\)"):
        RandomCrop(8, scale=(0.5, 2))
    with pytest.raises(ValueError, match="image_size=0"):
        Squash(0)
