"""Boxes in pixels of the picture as the encoder sees it, which Qwen2.5-VL reads and writes (Bai et al.
2025, section 2.1.2). Data and answers have them in 0..1000 everywhere else (`data.grounding`), so they
change where text goes into a row and where an answer comes out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from lightning_internvl.data.files.boxes import BOX, LARGEST, NUMBER
from lightning_internvl.data.templates import IMAGE, VIDEO, Message
from lightning_internvl.data.templates.base import rewritten

Size = tuple[int, int]  # height and width in pixels
WHOLE: Size = (LARGEST, LARGEST)
_MARKS = f"({re.escape(IMAGE)}|{re.escape(VIDEO)})"


def in_pixels(conversation: Sequence[Message], images: Sequence[Size], videos: Sequence[Size] = ()) -> list[Message]:
    """Messages whose boxes count pixels of the last picture or video that stands before them, in
    place of 0..1000.

    Args:
        images, videos: their sides as the encoder sees them, in the order of their marks.
    """
    waiting = {IMAGE: iter(images), VIDEO: iter(videos)}
    size = next(iter([*images, *videos]), WHOLE)

    def changed(texts: Iterable[str]) -> list[str]:
        nonlocal size
        found = []
        for text in texts:
            size = next(waiting[text], size) if text in waiting else size
            found.append(rescaled(text, WHOLE, size))
        return found

    return rewritten(conversation, _MARKS, changed)


def rescaled(text: str, before: Size, after: Size) -> str:
    """A text whose boxes, of a picture of one size, are those of the same picture at another."""

    def box(found: re.Match[str]) -> str:
        sides = itertools.cycle([(before[1], after[1]), (before[0], after[0])])  # numbers are x, y, x, y
        return NUMBER.sub(lambda number: _times(number[0], *next(sides)), found[0])

    return BOX.sub(box, text) if before != after else text


def _times(number: str, before: int, after: int) -> str:
    return str(round(float(number) * after / before))
