"""Pictures of any size and videos as Qwen2-VL, Qwen2.5-VL and Qwen3-VL read them: near their own size,
cut into patches (Wang et al. 2024, section 2.1; official image processor, and `qwen-vl-utils` for
videos).

Letters: H, W sides in pixels, F frames, P patches of all pictures, C values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_internvl.data.processors.basic import CLIP_MEAN, CLIP_STD, Processor, Size
from lightning_internvl.data.processors.pixels import gives_bytes, normalise_channels, to_tensor
from lightning_internvl.data.processors.resize import resized

MOST_STRETCHED = 200  # the longer side over the shorter one


class AnyResolution(Processor):
    """A picture at sides that are multiples of a block of patches, with its proportions nearly
    kept, as flat patches.

    Args:
        image_size: its square is the most pixels that a picture keeps (published: 3584, which gives
            16,384 tokens).
        min_pixels: smaller pictures are enlarged to so many.
        max_pixels: instead of the square of `image_size`.
        patch_size, merge_size, frames: of the encoder; a block of `merge_size` x `merge_size`
            patches gives one visual token.
        fps: frames taken of each second of a video.
        min_frames, max_frames: of a video; it is never more than it has.
        frame_pixels: the least and the most pixels of a frame.
        video_tokens: of a whole video; frames become smaller where there are many.
        mean, std: of the channels, on a scale from 0 to 1.
        resize: what resizes pictures, pillow or torch (see `data.processors.resize`).
    """

    limit = "image_size"
    timed = True
    gives = ("image_grid_thw",)  # beside flat patches

    def __init__(
        self,
        image_size: int,
        *,
        min_pixels: int = 56 * 56,
        max_pixels: int | None = None,
        patch_size: int = 14,
        merge_size: int = 2,
        frames: int = 2,
        fps: float = 2.0,
        min_frames: int = 4,
        max_frames: int = 768,
        frame_pixels: Sequence[int] = (128 * 28 * 28, 768 * 28 * 28),
        video_tokens: int = 24576,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        resize: str = "pillow",
    ) -> None:
        super().__init__(image_size, mean, std, resize)
        self.patch_size, self.merge_size, self.frames = patch_size, merge_size, frames
        self.factor = patch_size * merge_size
        self.min_pixels, self.max_pixels = min_pixels, max_pixels or image_size**2
        self.fps, self.min_frames, self.max_frames = fps, min_frames, max_frames
        self.frame_pixels, self.video_tokens = tuple(frame_pixels), video_tokens
        if not self.factor**2 <= self.max_pixels or not 0 < min_pixels <= self.max_pixels:
            raise ValueError(
                f"a picture needs room for a block of {self.factor} px and min_pixels <= "
                f"max_pixels: {image_size=}, {min_pixels=}, max_pixels={self.max_pixels}"
            )
        if fps <= 0 or not 1 <= min_frames <= max_frames or not 0 < self.frame_pixels[0] <= self.frame_pixels[1]:
            order = f"{min_frames=} <= {max_frames=}"
            raise ValueError(f"videos need {fps=} above 0, {order}, and frame_pixels from low to high")

    def __call__(self, image: np.ndarray, draw: Sequence[int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 -> (1, H', W', 3) uint8, the picture at the size that it is cut up in.
        Chance plays no part."""
        height, width = image.shape[:2]
        size = smart_size(height, width, self.factor, self.min_pixels, self.max_pixels)
        return self._at(image, *size)[None]

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        return 1, *smart_size(height, width, self.factor, self.min_pixels, self.max_pixels), 3

    def most_squares(self, pictures: int) -> int:
        """One of the largest size, in which many usual pictures have room."""
        return self.max_tiles

    def video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        """(F, H, W, 3) uint8 at `fps` frames a second -> (F', H', W', 3) uint8, an even number of
        frames.

        A video of a single frame is shown twice, as a picture is; its last frame fills up a step
        that is not full.

        Raises:
            ValueError: for a video without frames or a rate that is none.
        """
        if len(frames) == 0 or not fps > 0:
            given = f"this one has {len(frames)} at {fps} a second"
            raise ValueError(f"a video needs one frame or more and a rate above 0; {given}")
        chosen = frames[self._places(len(frames), fps)]
        if missing := -len(chosen) % self.frames:
            chosen = np.concatenate([chosen, *[chosen[-1:]] * missing])
        low, high = self.frame_pixels
        share = self.video_tokens * self.factor**2 * self.frames // len(chosen)
        most = max(min(high, share), int(low * 1.05))
        size = smart_size(frames.shape[1], frames.shape[2], self.factor, low, most)
        return np.stack([self._at(frame, *size) for frame in chosen])

    def step_seconds(self, frames: int, fps: float) -> float:
        """As in transformers: by how many frames are taken of a second of the video."""
        return self.frames / (len(self._places(frames, fps)) / frames * fps)

    def steps(self, video: np.ndarray) -> int:
        return self.grid(video)[0]

    def step_times(self, frames: int, fps: float) -> list[float]:
        """The middles of the steps, as Qwen3-VL tells them: between their first frames and their
        last. A rate that knows the seconds of its frames (`TimedRate`) gives them."""
        places = self._places(frames, fps)
        places += places[-1:] * (-len(places) % self.frames)
        firsts, lasts = places[:: self.frames], places[self.frames - 1 :: self.frames]
        known = getattr(fps, "seconds", [place / fps for place in range(frames)])
        return [(known[first] + known[last]) / 2 for first, last in zip(firsts, lasts, strict=True)]

    def _places(self, frames: int, fps: float) -> list[int]:
        return frame_places(frames, fps, self.fps, self.min_frames, self.max_frames, self.frames)

    def tokens(self, picture: np.ndarray, per_square: int, size: Size | None = None) -> int:
        """Visual tokens of a picture or video as `__call__` or `video` returned it."""
        t, h, w = self.grid(picture)
        return t * h * w // self.merge_size**2

    def grid(self, picture: np.ndarray) -> tuple[int, int, int]:
        """Steps, rows and columns of its patches."""
        frames, height, width, _ = picture.shape
        return -(-frames // self.frames), height // self.patch_size, width // self.patch_size

    def inputs(self, pictures: Sequence[np.ndarray], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` (P, C) float32, within `as_bytes` uint8, all patches one after the other,
        and `image_grid_thw` (pictures, 3) int64."""
        blank = torch.zeros(0, 3 * self.frames * self.patch_size**2, dtype=torch.uint8)
        patches = torch.cat([blank, *(self._patches(picture) for picture in pictures)])
        grids = torch.tensor([self.grid(one) for one in pictures], dtype=torch.int64).reshape(-1, 3)
        found = {"pixel_values": patches, "image_grid_thw": grids}
        return found if gives_bytes() else self.normalised(found)

    def _values(self, name: str, pixels: Tensor) -> Tensor:
        channels = pixels.float().unflatten(1, (3, 1, -1))
        return normalise_channels(channels, self.mean, self.std).flatten(1)

    def blank(self, squares: int, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The inputs of as many empty pictures of the largest size. Their grid is a list, which is
        read without memory."""
        side = self.image_size // self.factor * self.merge_size
        values = 3 * self.frames * self.patch_size**2
        pixels = torch.zeros(squares * side**2, values, device=device)
        return {"pixel_values": pixels, "image_grid_thw": [(1, side, side)] * squares}

    def _at(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        # Tensors may share its memory
        return np.require(resized(image, width, height, self.resize), requirements=["WRITEABLE"])

    def _patches(self, picture: np.ndarray) -> Tensor:
        """(F, H, W, 3) uint8 -> (P, C): blocks in reading order, the patches of each likewise, and
        inside a patch channel, frame, row, column."""
        pixels = to_tensor(picture).permute(0, 3, 1, 2)  # F, 3, H, W
        if len(pixels) < self.frames:  # a still picture
            pixels = pixels.expand(self.frames, -1, -1, -1)
        merge, patch = self.merge_size, self.patch_size
        x = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch)).unflatten(0, (-1, self.frames))
        # t, frame, channel, row of blocks, row in it, row of pixels, and the same for columns
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(0, 4).flatten(1)


def smart_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as multiples of `factor`, with at least `min_pixels` and at most
    `max_pixels`, near the proportions.

    Source: `smart_resize` of transformers, whose import costs seconds and a thousand modules; a
    test holds both equal. Raises ValueError for a strip whose sides differ by more than
    200 times.
    """
    if max(height, width) > MOST_STRETCHED * min(height, width):
        most = f"its sides may differ {MOST_STRETCHED} times at most"
        raise ValueError(f"a picture of {width} x {height} px is a strip; {most}, crop it first")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / scale / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) for side in (height, width))
    return rows * factor, columns * factor


def frame_places(total: int, fps: float, wanted_fps: float, least: int, most: int, step: int) -> list[int]:
    """Which of `total` frames are taken: spread evenly from the first to the last, a multiple of
    `step`, or all where the video has fewer than one step. Source: `qwen-vl-utils`, which refuses a
    video of one frame."""
    count = min(max(total / fps * wanted_fps, least), most, total)
    count = min(round(count / step), total // step) * step
    if count == 0:
        return list(range(total)) if total < step else list(range(step))
    return np.linspace(0, total - 1, count).round().astype(int).tolist()
