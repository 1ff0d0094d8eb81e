"""Videos as pictures: each frame is one square, named in the text by its number (InternVL 2 and
later, `internvl_chat_pretrain.py`, `video_get_item`).

Letters: F frames, H, W sides in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lightning_internvl.data.collate.base import Sample, check_video_marks
from lightning_internvl.data.files.videos import frame_places
from lightning_internvl.data.templates import IMAGE, VIDEO, ChatTemplate, Message

FRAME = "Frame-{}: " + IMAGE
MARKS = re.compile(f"{IMAGE}|{VIDEO}")


class FrameLimits(NamedTuple):
    """How many frames of a video are shown."""

    least: int
    most: int

    @classmethod
    def of(cls, given: Sequence[int]) -> FrameLimits:
        """From the setting `video_frames`. Raises ValueError for no two rising whole numbers."""
        whole = len(given) == 2 and all(isinstance(one, int) and not isinstance(one, bool) for one in given)
        if not whole or not 1 <= given[0] <= given[1]:
            form = "two whole numbers that rise from 1, the least and the most frames of a video, as in [8, 32]"
            raise ValueError(f"data.chats_collate.video_frames={list(given)} must be {form}")
        return cls(*given)

    def places(self, frames: int, draw: Sequence[int] | None) -> list[int]:
        """Frames that are shown of so many, in order and each once.

        With a draw their number is drawn between the limits, and from each of as many equal parts a
        frame; without one there are as many as may be, the middles of their parts.
        """
        if draw is None:
            return frame_places(frames, min(self.most, frames))
        rng = np.random.default_rng(list(draw))
        wanted = min(int(rng.integers(self.least, self.most + 1)), frames)
        edges = [part * frames // wanted for part in range(wanted + 1)]
        return [int(rng.integers(start, end)) for start, end in pairwise(edges)]


def with_frames(sample: Sample, limits: FrameLimits, template: ChatTemplate) -> Sample:
    """A sample whose videos are pictures in their places; "frames" are the places of these among
    its pictures.

    Raises:
        ValueError: naming the sample, for videos and marks that differ in number, and for a video
            without frames.
    """
    videos, rest = [frames for frames, _ in sample.get("videos", ())], iter(sample["images"])
    messages = [template.written(message) for message in sample["conversation"]]
    check_video_marks(messages, len(videos), sample["key"])
    found = [mark for message in messages for mark in MARKS.findall(message["content"])]
    chosen = [_chosen(sample, limits, place, frames) for place, frames in enumerate(videos)]
    shown = _in_order(found, rest, iter(chosen))
    shown += [(image, False) for image in rest]
    texts = iter(["\n".join(FRAME.format(number + 1) for number in range(len(frames))) for frames in chosen])
    conversation: list[Message] = [
        {**message, "content": re.sub(VIDEO, lambda _: next(texts), message["content"])} for message in messages
    ]
    places = frozenset(place for place, (_, is_frame) in enumerate(shown) if is_frame)
    images = [picture for picture, _ in shown]
    return {**sample, "images": images, "videos": [], "conversation": conversation, "frames": places}


def _chosen(sample: Sample, limits: FrameLimits, place: int, frames: np.ndarray) -> np.ndarray:
    """The frames of a video that are shown."""
    if frames.ndim != 4 or not len(frames):
        raise ValueError(f"sample {sample['key']}: its video is {frames.shape}, not (F, H, W, 3) with a frame")
    draw = [*sample["draw"], place] if "draw" in sample else None
    return frames[limits.places(len(frames), draw)]


def _in_order(marks: Sequence[str], images: Iterator[Any], videos: Iterator[np.ndarray]) -> list[tuple[Any, bool]]:
    """Pictures and frames as their marks stand in the text, and which are frames."""
    shown: list[tuple[Any, bool]] = []
    for mark in marks:
        if mark == VIDEO:
            shown += [(frame, True) for frame in next(videos)]
        elif (image := next(images, None)) is not None:
            shown.append((image, False))
    return shown
