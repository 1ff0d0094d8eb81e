"""How a picture becomes what the encoder sees: (H, W, 3) uint8 of any size -> n squares (n, S, S,
3) uint8.

A processor is one class and one YAML in `conf/processor/`. Pixels are normalised where batches are
made (`Processor.inputs`), with the processor's mean and standard deviation. All resizing is the
bicubic filter, as in the published systems.
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_internvl.data.processors.pixels import IMAGENET_MEAN, IMAGENET_STD, gives_bytes, to_pixels, to_tensor
from lightning_internvl.data.processors.resize import check_kernel, resized

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = Image.Resampling.BICUBIC
PIXELS = ("pixel_values", "pixel_values_videos", "high_res_pixel_values")  # of a batch
Size = tuple[int, int]  # height and width in pixels
LONGEST_STRIP = 32  # sides of a picture that a centre crop enlarges whole


class Processor(ABC):
    """What all processors share.

    Args:
        image_size: S, side in pixels of what the encoder sees.
        mean, std: of the channels, on a scale from 0 to 1.
        resize: what resizes pictures, pillow or torch (see `data.processors.resize`).

    Attributes:
        max_tiles: the most squares that one picture gives.
        limit: the setting that makes pictures cost fewer tokens; None where all cost the same.
        random: whether a draw changes what is seen of a picture.
        timed: whether batches say how many seconds a step of each video takes.
        gives: inputs of an encoder or a middleware beside `pixel_values`.
        whole_gives: likewise of the processor that `whole` returns; None: those of `gives`.
        jpeg_quality: from which qualities one is drawn where a picture goes through JPEG
            (`data.jpeg_quality`); None: it does not.
    """

    max_tiles = 1
    limit: str | None = None
    random = False
    timed = False
    jpeg_quality: Sequence[int] | None = None
    gives: tuple[str, ...] = ()
    whole_gives: tuple[str, ...] | None = None

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        resize: str = "pillow",
    ) -> None:
        if image_size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            given = f"{image_size=}, {mean=}, {std=}"
            raise ValueError(f"a processor needs a side above 0 and three means and deviations: {given}")
        self.image_size, self.mean = image_size, tuple(mean)
        self.std, self.resize = tuple(std), check_kernel(resize)

    @abstractmethod
    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 -> (n, S, S, 3) uint8.

        Args:
            draw: whole numbers from 0 on that fix all chance in it; None leaves chance out.
        """

    def whole(self) -> Processor:
        """The processor where a picture is one square (contrastive stages); here this one."""
        return self

    def shared(self, pictures: int) -> Processor:
        """The processor for each of so many pictures of a record in training; here this one."""
        return self

    def asked(self, pictures: int) -> Processor:
        """The processor for each of so many pictures of a record that is to be answered; here this
        one."""
        return self

    def most_squares(self, pictures: int) -> int:
        """Squares that a record of up to so many pictures may need."""
        return self.max_tiles * max(1, pictures)

    def most_tokens(self, per_square: int, pictures: int = 1) -> int:
        """Visual tokens that a record of up to so many pictures may need, where a square has
        `per_square`."""
        return self.most_squares(pictures) * per_square

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of what `__call__` makes of a picture of that size, by trying it. Raises
        ValueError as it does."""
        return self(np.zeros((height, width, 3), dtype=np.uint8)).shape

    def video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        """(F, H, W, 3) uint8 at `fps` frames a second -> the frames that the encoder sees. Raises
        ValueError if it sees none."""
        other = "processor@data.processor=any_resolution, or data.chats_collate.video_frames=[8, 32], which makes frames pictures"
        raise ValueError(f"{type(self).__name__} prepares pictures only; videos need {other}")

    def step_seconds(self, frames: int, fps: float) -> float:
        """The seconds that pass from one step of a video of so many frames to its next, as `video`
        chooses them; here a frame is a step."""
        return 1 / fps

    def steps(self, video: np.ndarray) -> int:
        """Steps of a video as `video` returned it; here its frames."""
        return len(video)

    def step_times(self, frames: int, fps: float) -> list[float]:
        """The seconds at which these steps stand; here those of all frames."""
        return [place / fps for place in range(frames)]

    def tokens(self, picture: np.ndarray, per_square: int, size: Size | None = None) -> int:
        """Visual tokens of a picture as `__call__` returned it, where a square has `per_square`.

        Args:
            size: of the picture that it was made of; None for a video.
        """
        return len(picture) * per_square

    def inputs(self, pictures: Sequence[np.ndarray], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """What the encoder reads of pictures as `__call__` returned them: `pixel_values` (all
        squares, 3, S, S) float32, within `as_bytes` (all squares, S, S, 3) uint8; a processor may
        add more (`image_grid_thw`). There may be no pictures at all.

        Args:
            sizes: of the pictures that they were made of; None for videos.
        """
        if gives_bytes():
            blank = np.zeros((0, self.image_size, self.image_size, 3), dtype=np.uint8)
            return {"pixel_values": to_tensor(np.concatenate([blank, *pictures]))}
        values = torch.empty(sum(map(len, pictures)), 3, self.image_size, self.image_size)
        start = 0
        # Each into its place, which needs no memory for all of them as bytes
        for picture in pictures:
            to_pixels(picture, self.mean, self.std, values[start : start + len(picture)])
            start += len(picture)
        return {"pixel_values": values}

    def normalised(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with float32 in place of what `inputs` gave as bytes, on whatever device it is."""
        bytes_of = {name: x for name, x in batch.items() if name in PIXELS and x.dtype == torch.uint8}
        return {**batch, **{name: self._values(name, x) for name, x in bytes_of.items()}}

    def _values(self, name: str, pixels: Tensor) -> Tensor:
        """One of `PIXELS` from bytes."""
        return to_pixels(pixels, self.mean, self.std)

    def blank(self, squares: int, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The inputs of as many empty squares, of the largest pictures that there may be."""
        return {"pixel_values": torch.zeros(squares, 3, self.image_size, self.image_size, device=device)}

    def _resized(self, image: np.ndarray, columns: int = 1, rows: int = 1) -> np.ndarray:
        """The picture at columns x rows squares, whatever its proportions."""
        return resized(image, columns * self.image_size, rows * self.image_size, self.resize)


class OneSquare(Processor):
    """What makes one square of every picture."""

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """(1, S, S, 3)"""
        return 1, self.image_size, self.image_size, 3


class Squash(OneSquare):
    """The whole picture as one square, whatever its proportions."""

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        return self._resized(image)[None]


class CenterCrop(OneSquare):
    """The short side resized to S, and the square in the middle (CLIP; LLaVA v1)."""

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        # The ends of a strip fall away anyhow, and a strip of 1 x 5000 px would be enlarged to
        # gigabytes.
        longest = LONGEST_STRIP * min(image.shape[:2])
        image = centre(image, min(image.shape[0], longest), min(image.shape[1], longest))
        height, width = image.shape[:2]
        short = min(height, width)
        size = (int(self.image_size * width / short), int(self.image_size * height / short))
        image = resized(image, *size, self.resize)
        return centre(image, self.image_size, self.image_size)[None]


class RandomCrop(OneSquare):
    """A random part of the picture, resized to a square: augmentation for contrast.

    The part covers a share of the area drawn from `scale`, at proportions drawn from `ratio`
    (uniform in the logarithm); where ten draws do not fit, the middle is taken. With `flip`, half
    of them are mirrored. Without a draw, as in evaluation, the whole picture is squashed, by Pillow
    whatever `resize` says. Source: RandomResizedCrop of torchvision.
    """

    random = True

    def __init__(
        self,
        image_size: int,
        scale: Sequence[float] = (0.5, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        resize: str = "pillow",
    ) -> None:
        super().__init__(image_size, mean, std, resize)
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"scale must rise within 0..1 and ratio from above 0: {scale=}, {ratio=}")
        self.scale, self.ratio, self.flip = tuple(scale), tuple(ratio), flip

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        if draw is None:
            return resized(image, self.image_size, self.image_size)[None]
        rng = np.random.default_rng(list(draw))
        part = self._resized(self._part(image, rng))
        return (part[:, ::-1] if self.flip and rng.random() < 0.5 else part)[None]

    def _part(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        (least, most), (low, high) = self.scale, self.ratio
        for _ in range(10):
            area = height * width * rng.uniform(least, most)
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                return image[top : top + h, left : left + w]
        return centre(image, min(height, round(width / low)), min(width, round(height * high)))


class Tiles(Processor):
    """Dynamic tiling: the grid of squares nearest to the picture's proportions, then the whole
    picture once more.

    Tiles come in reading order, the thumbnail last, and only where there is more than one tile.
    Source: InternVL 1.5 (Chen et al., 2024), section 3.2; official `dynamic_preprocess`.

    Args:
        min_tiles, max_tiles: how many tiles a grid may have; the attribute `max_tiles` counts the
            thumbnail too.
        thumbnail: whether the whole picture follows its tiles.
    """

    limit = "max_tiles"

    def __init__(
        self,
        image_size: int,
        min_tiles: int = 1,
        max_tiles: int = 12,
        thumbnail: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        resize: str = "pillow",
    ) -> None:
        super().__init__(image_size, mean, std, resize)
        if not 1 <= min_tiles <= max_tiles:
            raise ValueError(f"tiles need 1 <= min_tiles <= max_tiles: {min_tiles=}, {max_tiles=}")
        self.limits, self.thumbnail = (min_tiles, max_tiles), thumbnail
        self._shared: dict[int, Tiles] = {}
        self.max_tiles = max_tiles + (thumbnail and max_tiles > 1)

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        side = self.image_size
        columns, rows = choose_grid(image.shape[1], image.shape[0], side, *self.limits)
        grid = self._resized(image, columns, rows).reshape(rows, side, columns, side, 3)
        tiles = grid.transpose(0, 2, 1, 3, 4).reshape(rows * columns, side, side, 3)
        if self.thumbnail and len(tiles) > 1:
            return np.concatenate([tiles, self._resized(image)[None]])
        return tiles

    def shared(self, pictures: int) -> Processor:
        """With max(1, max_tiles // pictures) tiles for each picture: the limit is that of a record
        (`internvl_chat_finetune.py`, `multi_modal_multi_image_get_item`)."""
        if pictures < 2:
            return self
        if pictures not in self._shared:
            found = copy.copy(self)
            most = max(1, self.limits[1] // pictures)
            found.limits = min(self.limits[0], most), most
            found.max_tiles = most + (self.thumbnail and most > 1)
            self._shared[pictures] = found
        return self._shared[pictures]

    def most_squares(self, pictures: int) -> int:
        return max(self.shared(count).max_tiles * count for count in range(1, max(1, pictures) + 1))

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        columns, rows = choose_grid(width, height, self.image_size, *self.limits)
        tiles = columns * rows
        return tiles + (self.thumbnail and tiles > 1), self.image_size, self.image_size, 3

    def whole(self) -> Processor:
        """The thumbnail alone."""
        return Squash(self.image_size, self.mean, self.std, self.resize)


@functools.lru_cache(maxsize=4096)
def choose_grid(width: int, height: int, image_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of the grid for a picture: the smallest |width / height - columns / rows|.

    Of grids exactly as near, a later (larger) one wins if the picture has more than half of its
    pixels. Source: official `find_closest_aspect_ratio`.
    """
    best, best_gap = (1, 1), math.inf
    for columns, rows in grids(min_tiles, max_tiles):
        gap = abs(width / height - columns / rows)
        fills = width * height > 0.5 * image_size * image_size * columns * rows
        if gap < best_gap or (gap == best_gap and fills):
            best, best_gap = (columns, rows), gap
    return best


@functools.cache
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of min_tiles to max_tiles tiles, by their number."""
    # The original sorts a set; grids of equal area keep its order, which decides ties, so the same
    # set is built here.
    found = {
        (i, j)
        for n in range(min_tiles, max_tiles + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if min_tiles <= i * j <= max_tiles
    }
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) -> (height, width, 3), the part in the middle."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
