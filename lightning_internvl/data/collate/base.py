"""What all collators share: the two steps of their work, pictures to tiles, rows to tensors.

A collator does all that one sample needs in `prepare`, which alone can find fault with it; `stack`
puts prepared samples into one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_internvl.data.processors.basic import Processor, Size
from lightning_internvl.data.processors.jpeg import recompressed
from lightning_internvl.data.templates import VIDEO, Message

# What the host reads of a batch's pictures, sizes and numbers, and of questions; a device would have to be asked.
ON_HOST = (
    "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "image_counts", "image_sizes", "image_grids", "video_grids",
    "questions",
)  # fmt: skip
Sample = Mapping[str, Any]
Prepared = dict[str, Any]
Whole = TypeVar("Whole")


class Collator(Protocol):
    """Samples to a batch, one at a time and then together."""

    def prepare(self, sample: Sample) -> Prepared:
        """All work on one sample. Raises ValueError naming the sample if it cannot be used."""

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """Prepared samples to a batch."""


def tiles_of(processor: Processor, image: np.ndarray, key: str, draw: Sequence[int] | None = None) -> np.ndarray:
    """What the encoder sees of one picture: (n, S, S, 3) uint8, with a draw after the processor's
    JPEG. Raises ValueError naming the sample for no (H, W, 3) uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"sample {key}: its picture is {image.shape} {image.dtype}, not (H, W, 3) uint8")
    try:
        squares = processor(image, draw)
        return squares if draw is None or not processor.jpeg_quality else recompressed(squares, processor.jpeg_quality, draw)
    except ValueError as error:
        raise ValueError(f"sample {key}: {error}") from error


def sizes_of(sample: Sample) -> list[Size]:
    """Height and width of each picture of a sample, as it came."""
    return [(image.shape[0], image.shape[1]) for image in sample["images"]]


def check_video_marks(conversation: Sequence[Message], videos: int, key: str) -> None:
    """Raises ValueError naming the sample unless there is one mark a video."""
    marks = sum(message["content"].count(VIDEO) for message in conversation)
    if marks != videos:
        raise ValueError(f"sample {key}: {videos} videos but {marks} {VIDEO!r} marks")


def video_of(processor: Processor, frames: np.ndarray, fps: float, key: str) -> np.ndarray:
    """What the encoder sees of one video: (F, H, W, 3) uint8. Raises ValueError naming the sample
    for no (F, H, W, 3) uint8."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        wanted = "(F, H, W, 3) uint8 with a frame"
        raise ValueError(f"sample {key}: its video is {frames.shape} {frames.dtype}, not {wanted}")
    try:
        return processor.video(frames, fps)
    except ValueError as error:
        raise ValueError(f"sample {key}: {error}") from error


def pixels_of(processor: Processor, tiles: Sequence[np.ndarray]) -> Tensor:
    """The normalised tiles of some pictures in a row: (N, 3, S, S) float32; N may be 0."""
    return processor.inputs(tiles)["pixel_values"]


class SquareReader:
    """What reads pictures as one square each: collators of pairs and of labels."""

    processor: Processor

    def pixels(
        self,
        images: Sequence[np.ndarray],
        keys: Sequence[str],
        draws: Sequence[Sequence[int] | None] | None = None,
    ) -> Tensor:
        """Pictures to (B, 3, S, S) float32; `draws` fixes the chance of each (see `Processor`)."""
        found = zip(images, keys, draws or [None] * len(images), strict=True)
        return pixels_of(self.processor, [tiles_of(self.processor, *one) for one in found])


def picture_keys(prepared: Sequence[Prepared], wanted: bool) -> dict[str, list[str]]:
    """`picture_keys`: a name for the bytes of each square of prepared samples, if wanted."""
    if not wanted:
        return {}
    pictures = (picture for one in prepared for picture in one.get("pictures", [one.get("tiles")]))
    squares = (square for picture in pictures for square in picture)
    digests = (hashlib.blake2b(square.tobytes(), digest_size=16) for square in squares)
    return {"picture_keys": [digest.hexdigest() for digest in digests]}


def unchanged(prepared: Whole) -> Whole:
    """For a `DataLoader` whose data set gives whole batches; it travels to processes."""
    return prepared


def stable_id(name: str) -> int:
    """A whole number below 2**63 for a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-pad rows with `value`: (B, L) int64, and the (B, L) int64 mask (1: real)."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    padded = torch.tensor([[*r, *[value] * (width - len(r))] for r in rows], dtype=torch.int64)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return padded, mask.long()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id does for padding, because the masks come from lengths."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
