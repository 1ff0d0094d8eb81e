"""Videos beside pictures: they go the same way, under names of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_internvl.data.collate.pairs_of_answers import COPIES

VIDEOS = "pixel_values_videos"
BY_PICTURE = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "image_counts")  # what decoders read of each


def repeated(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a decoder reads of pictures, for each group of rows that share them."""
    copies = inputs.get(COPIES, 1)
    if copies == 1:
        return inputs
    own = {name: inputs[name] for name in BY_PICTURE if inputs.get(name) is not None}
    return {**inputs, **{name: x.repeat(copies, *[1] * (x.ndim - 1)) for name, x in own.items()}}


def join_pictures_and_videos(
    pixel_values: Tensor | None, inputs: dict[str, Any]
) -> tuple[Tensor | None, tuple[int, int], dict[str, Any]]:
    """Pictures and videos as one input of the encoder, how much of it are pictures and how much
    videos, and the other inputs.

    Together, so that the encoder runs once whatever a batch holds, as sharding over ranks needs.
    """
    videos = inputs.get(VIDEOS)
    rest = {name: value for name, value in inputs.items() if name != VIDEOS}
    if videos is None:
        return pixel_values, (0 if pixel_values is None else len(pixel_values), 0), rest
    if pixel_values is None:
        pixel_values = videos[:0]
    for name in [name for name in rest if name.startswith("video_")]:
        twin = name.replace("video_", "image_", 1)
        rest[twin] = _behind(rest.get(twin), rest.pop(name))
    return torch.cat([pixel_values, videos]), (len(pixel_values), len(videos)), rest


def _behind(images: Any, videos: Any) -> Any:
    if images is None:
        return videos
    return torch.cat([images, videos]) if isinstance(videos, Tensor) else [*images, *videos]
