"""Pictures padded to squares: place and colour of the border. Exact pixels: the fixture llava_preprocess."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_internvl.data.processors.padded import PadSquare


@pytest.mark.parametrize(("height", "width", "top", "left"), [(3, 6, 1, 0), (6, 3, 0, 1), (4, 4, 0, 0), (1, 5, 2, 0)])
def test_the_picture_stands_in_the_middle(height: int, width: int, top: int, left: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square = PadSquare(8).square(image)
    longer = max(height, width)
    assert square.shape == (longer, longer, 3)
    assert (square[top : top + height, left : left + width] == image).all()
    border = np.ones((longer, longer), dtype=bool)
    border[top : top + height, left : left + width] = False
    assert (square[border] == (122, 116, 104)).all()


def test_it_gives_one_square_of_its_size() -> None:
    image = np.zeros((30, 50, 3), dtype=np.uint8)
    assert PadSquare(16)(image).shape == (1, 16, 16, 3)
    assert PadSquare(16).whole().max_tiles == 1
    assert (PadSquare(50, colour=(0, 0, 0))(image) == 0).all()


@pytest.mark.parametrize("colour", [(0, 0), (0, 0, 256)])
def test_no_colour(colour: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="red, green and blue from 0 to 255"):
        PadSquare(8, colour=colour)
