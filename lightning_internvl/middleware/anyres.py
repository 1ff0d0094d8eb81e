"""The connector of LLaVA-NeXT and LLaVA-OneVision: an MLP on the visual tokens of each square, which
are then put together to pictures and videos (official `llava_arch.py`, `mm_patch_merge_type`
`spatial_unpad`; transformers' `LlavaNextModel` and `LlavaOnevisionModel`).

Letters: N squares and frames, P visual tokens of one (special ones first), G side of their grid, D
encoder width, H decoder width, T visual tokens of all pictures and videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.layers import best_grid
from lightning_internvl.layers.best_grid import ALONE, Size
from lightning_internvl.middleware.connector import MLPConnector


class AnyresMLP(MLPConnector):
    """Patches of each square through an MLP, then picture by picture: first the whole picture in one
    square, then its grid of squares as one map, without the border, with `image_newline` behind
    each row.

    Args:
        grids: rows and columns of squares that a picture may be shown in.
        map_squares: a map of more tokens than so many squares have is made smaller, bilinearly
            (OneVision: 9); None: never (LLaVA-NeXT).
        frame_pool: visual tokens of a video's frames are pooled so many times so many, bilinearly,
            and one `image_newline` follows the last frame (OneVision: 2); None: there are no videos.
        connector: the other arguments are those of `MLPConnector`.
    """

    inputs = ("image_sizes", "image_grids", "batch_num_images")  # the last for `as_squares` alone
    uneven = True  # pictures differ in tokens

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        grids: Sequence[Sequence[int]],
        map_squares: int | None = None,
        frame_pool: int | None = None,
        patch_layer: int | Sequence[int] = -1,
        special_tokens: int = 1,
        keep_special: bool = False,
        depth: int = 2,
        bias: bool = True,
    ) -> None:
        super().__init__(
            encoder_dim=encoder_dim, decoder_dim=decoder_dim, patch_layer=patch_layer, special_tokens=special_tokens,
            keep_special=keep_special, depth=depth, bias=bias,
        )  # fmt: skip
        self.grids = best_grid.checked_grids(grids)
        if (map_squares is not None and map_squares < 1) or (frame_pool is not None and frame_pool < 1):
            raise ValueError(f"{map_squares=} and {frame_pool=} must be 1 or more, or null")
        self.map_squares, self.frame_pool = map_squares, frame_pool
        self.image_newline = nn.Parameter(torch.zeros(decoder_dim))
        nn.init.normal_(self.image_newline, std=decoder_dim**-0.5)

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for a picture that is one square of `tokens_in` visual tokens."""
        return best_grid.square_side(super().tokens_out(tokens_in)) ** 2 + 1

    def video_tokens(self, tokens_in: int, inputs: dict[str, Any]) -> int:
        """How many of all visual tokens are of videos.

        Args:
            tokens_in: of a square, special ones included.
            inputs: as `forward` takes them.
        """
        side = best_grid.square_side(super().tokens_out(tokens_in))
        videos = _pairs(inputs.get("image_grids"))[len(_pairs(inputs.get("image_sizes"))) :]
        return sum(best_grid.video_tokens(frames, side, self._pool()) for frames, _ in videos)

    def as_squares(self, pixel_values: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """Pixels and inputs as `forward` reads them, of what transformers' processors give: stacks of
        squares filled up to one number (pictures, n, 3, S, S) with `image_sizes` and
        `batch_num_images`, and videos (videos, F, 3, S, S). What is so already stays.

        Raises:
            ValueError: for pictures without `image_sizes`, a number of squares that their grids do
                not have, and videos where there are none.
        """
        inputs, videos = dict(inputs), inputs.get("pixel_values_videos")
        if videos is not None and videos.ndim == 5:
            self._pool()
            inputs["video_grids"] = [(videos.shape[1], 0)] * len(videos)
            inputs["pixel_values_videos"] = videos.flatten(0, 1)
        counts = inputs.pop("batch_num_images", None)
        if pixel_values is None or inputs.get("image_grids") is not None:
            return pixel_values, inputs
        sizes = _pairs(inputs.get("image_sizes"))
        if len(pixel_values) and not sizes:
            raise ValueError("pictures need image_sizes (pictures, 2): height and width of each before it was resized")
        alone = [int(count) > 1 for count in (() if counts is None else counts) for _ in range(int(count))]
        side = pixel_values.shape[-1]
        best = [best_grid.best_grid(*size, side, self.grids) for size in sizes]
        grids = [ALONE if place < len(alone) and alone[place] else grid for place, grid in enumerate(best)]
        if pixel_values.ndim == 5:
            lengths = [rows * columns + 1 for rows, columns in grids]
            if len(lengths) != len(pixel_values) or max(lengths, default=0) > pixel_values.shape[1]:
                shape = tuple(pixel_values.shape[:2])
                raise ValueError(f"pixel_values has {shape} pictures and squares, but by image_sizes they have {lengths} squares")
            pixel_values = torch.cat([stack[:length] for stack, length in zip(pixel_values, lengths, strict=True)])
        return pixel_values, inputs | {"image_grids": grids}

    def forward(
        self,
        feats: list[Tensor],
        image_sizes: Tensor | Sequence[Size] | None = None,
        image_grids: Tensor | Sequence[Size] | None = None,
    ) -> Tensor:
        """One (N, P, D) a layer -> (T, H), the pictures, then the videos.

        Args:
            image_sizes: height and width of each picture before it was resized.
            image_grids: rows and columns of squares of each picture, (0, 0) for one that is a single
                square; behind them (frames, 0) of each video. None: all squares are pictures.

        Raises:
            ValueError: if squares and grids differ in number.
        """
        squares = super().forward(feats)
        side = best_grid.square_side(squares.shape[1])
        sizes, grids = _pairs(image_sizes), _pairs(image_grids) or [ALONE] * len(squares)
        sizes = sizes or [(1, 1)] * sum(grid == ALONE for grid in grids)
        pictures = len(sizes)
        lengths = [rows * columns + 1 for rows, columns in grids[:pictures]] + [frames for frames, _ in grids[pictures:]]
        if sum(lengths) != len(squares):
            raise ValueError(f"pictures and videos of {lengths} squares and frames, but there are {len(squares)}")
        parts = squares.split(lengths)
        shown = [self._picture(part, size, grid, side) for part, size, grid in zip(parts, sizes, grids, strict=False)]
        return torch.cat([*shown, *(self._video(part, side) for part in parts[pictures:])])

    def _picture(self, squares_NTH: Tensor, size: Size, grid: Size, side: int) -> Tensor:
        newline = self.image_newline.to(squares_NTH.dtype)
        if grid == ALONE:
            return torch.cat([squares_NTH[0], newline[None]])
        rows, columns = grid
        tiles = squares_NTH[1:].unflatten(0, (rows, columns)).unflatten(2, (side, side))  # r, c, G, G, H
        whole = tiles.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2)  # H, r * G, c * G
        top, left, height, width = best_grid.unpadded(*size, grid, side)
        shown = whole[:, top : top + height, left : left + width]
        smaller = best_grid.reduced(height, width, side, self.map_squares)
        if smaller != (height, width):
            shown = F.interpolate(shown[None], smaller, mode="bilinear")[0]
        ends = newline[:, None, None].expand(-1, shown.shape[1], 1)
        return torch.cat([squares_NTH[0], torch.cat([shown, ends], dim=2).flatten(1).T])

    def _video(self, frames_FTH: Tensor, side: int) -> Tensor:
        pooled = -(-side // self._pool())
        maps = frames_FTH.transpose(1, 2).unflatten(2, (side, side))  # F, H, G, G
        small = F.interpolate(maps, (pooled, pooled), mode="bilinear").flatten(2).transpose(1, 2)
        return torch.cat([small.flatten(0, 1), self.image_newline.to(small.dtype)[None]])

    def _pool(self) -> int:
        if self.frame_pool is None:
            raise ValueError("there are videos, and this model reads pictures only (middleware.frame_pool=null)")
        return self.frame_pool


def _pairs(values: Tensor | Sequence[Size] | None) -> list[Size]:
    found = values.tolist() if isinstance(values, Tensor) else values or ()
    return [(int(first), int(second)) for first, second in found]
