"""Pictures as LLaVA-NeXT and LLaVA-OneVision see them: the whole in one square, then the squares of
the grid that shows most of it, in its proportions on black (official `process_anyres_image`).

Letters: H, W sides in pixels, S side of a square, F frames, G side of a square's visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_internvl.data.processors.any_resolution import frame_places
from lightning_internvl.data.processors.basic import CLIP_MEAN, CLIP_STD, Processor, Size, Squash
from lightning_internvl.data.processors.padded import PadSquare, centred
from lightning_internvl.data.processors.resize import resized
from lightning_internvl.layers import best_grid
from lightning_internvl.layers.best_grid import ALONE


class BestGrid(Processor):
    """A grid of squares for a picture, chosen by its size. The connector puts the squares together again
    (`middleware.anyres.AnyresMLP`), which must have the same grids and limits.

    Args:
        image_size: S.
        grids: rows and columns of squares that a picture may be shown in.
        map_squares, frame_pool: as in `AnyresMLP`: they say how many visual tokens there are.
        alone_with_others: whether each of several pictures of a record is one square, padded to it
            with the mean colour (OneVision).
        fps: frames taken of each second of a video.
        max_frames: of a video; it is never more than it has.
        mean, std: of the channels, on a scale from 0 to 1.
        resize: what resizes pictures, pillow or torch (see `data.processors.resize`).
    """

    limit = "grids"
    gives = ("image_sizes", "image_grids")  # beside squares
    whole_gives = ()

    def __init__(
        self,
        image_size: int,
        grids: Sequence[Sequence[int]],
        map_squares: int | None = None,
        frame_pool: int | None = None,
        alone_with_others: bool = False,
        fps: float = 1.0,
        max_frames: int = 32,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        resize: str = "pillow",
    ) -> None:
        super().__init__(image_size, mean, std, resize)
        self.grids = best_grid.checked_grids(grids)
        if fps <= 0 or max_frames < 1:
            raise ValueError(f"videos need {fps=} above 0 and {max_frames=} of 1 or more")
        self.map_squares, self.frame_pool, self.fps, self.max_frames = map_squares, frame_pool, fps, max_frames
        self.max_tiles = 1 + max(rows * columns for rows, columns in self.grids)
        self.alone_with_others = alone_with_others
        self._alone = PadSquare(image_size, mean, std, resize=resize) if alone_with_others else None

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 -> (1 + rows * columns, S, S, 3) uint8, the whole picture first. Chance plays
        no part."""
        side, size = self.image_size, image.shape[:2]
        rows, columns = self.grid(size[0], size[1])
        inner = best_grid.inner_size(size[0], size[1], (rows * side, columns * side))
        grid = centred(resized(image, inner[1], inner[0], self.resize), rows * side, columns * side)
        squares = grid.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
        return np.concatenate([self._resized(image)[None], squares])

    def grid(self, height: int, width: int) -> Size:
        """Rows and columns of squares of a picture of that size."""
        return best_grid.best_grid(height, width, self.image_size, self.grids)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        rows, columns = self.grid(height, width)
        return 1 + rows * columns, self.image_size, self.image_size, 3

    def whole(self) -> Processor:
        """The whole picture in one square."""
        return Squash(self.image_size, self.mean, self.std, self.resize)

    def shared(self, pictures: int) -> Processor:
        if self._alone is None or pictures < 2:
            return self
        self._alone.jpeg_quality = self.jpeg_quality
        return self._alone

    def asked(self, pictures: int) -> Processor:
        return self.shared(pictures)

    def most_squares(self, pictures: int) -> int:
        return max(self.max_tiles, pictures) if self._alone is not None else super().most_squares(pictures)

    def most_tokens(self, per_square: int, pictures: int = 1) -> int:
        side = best_grid.square_side(per_square - 1)
        one = max(self._most_of(grid, side) for grid in self.grids)
        return max(one, pictures * per_square) if self._alone is not None else one * max(1, pictures)

    def _most_of(self, grid: Size, side: int) -> int:
        """Visual tokens of the picture that fills a grid."""
        return best_grid.picture_tokens((grid[0] * self.image_size, grid[1] * self.image_size), grid, side, self.map_squares)

    def video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        """(F, H, W, 3) uint8 at `fps` frames a second -> (F', S, S, 3) uint8, spread evenly.

        Raises:
            ValueError: where there are no videos, and for one without frames or a rate that is none.
        """
        if self.frame_pool is None:
            fault = f"{type(self).__name__} prepares pictures only where frame_pool is null, as LLaVA-NeXT has it"
            raise ValueError(f"{fault}; videos need middleware.frame_pool=2 (experiment=llava_onevision)")
        if len(frames) == 0 or not fps > 0:
            given = f"this one has {len(frames)} at {fps} a second"
            raise ValueError(f"a video needs one frame or more and a rate above 0; {given}")
        places = frame_places(len(frames), fps, self.fps, 1, self.max_frames, 1)
        return np.stack([self._resized(frames[place]) for place in places])

    def tokens(self, picture: np.ndarray, per_square: int, size: Size | None = None) -> int:
        side = best_grid.square_side(per_square - 1)
        if size is None:
            return best_grid.video_tokens(len(picture), side, self.frame_pool or 1)
        return best_grid.picture_tokens(size, self._grid_of(picture, size), side, self.map_squares)

    def inputs(self, pictures: Sequence[np.ndarray], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` as in `Processor`, `image_grids` (pictures, 2) int64, the rows and columns of
        squares of each picture, (0, 0) for one that is a single square, and `image_sizes`
        (pictures, 2) int64; of videos only `image_grids`, (frames, 0)."""
        found = super().inputs(pictures)
        if sizes is None:
            grids = [(len(frames), 0) for frames in pictures]
        else:
            grids = [self._grid_of(picture, size) for picture, size in zip(pictures, sizes, strict=True)]
            found["image_sizes"] = _table(sizes)
        return found | {"image_grids": _table(grids)}

    def blank(self, squares: int, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The inputs of as many empty pictures that are one square. Sizes and grids are lists, which are
        read without memory."""
        side = self.image_size
        return super().blank(squares, device) | {"image_sizes": [(side, side)] * squares, "image_grids": [ALONE] * squares}

    def _grid_of(self, picture: np.ndarray, size: Size) -> Size:
        return ALONE if len(picture) == 1 else self.grid(*size)


def _table(pairs: Sequence[Size]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
