"""Things and where they are, in text: "<ref>the cat</ref><box>(120,48),(510,930)</box>", as Qwen-VL
writes and reads it.

A box is (x0, y0, x1, y1) in 0..1, left, top, right, bottom; its text has whole numbers in 0..1000
(Bai et al. 2023, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]

SCALE = 1000
_BOX = r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>"
_PIECE = re.compile(rf"<ref>(?P<phrase>.*?)</ref>|{_BOX}", re.DOTALL)
_MARK = re.compile(r"</?(?:ref|box)>")


@dataclass(frozen=True)
class Grounded:
    """A phrase and its boxes; a box that no phrase precedes has phrase None."""

    phrase: str | None
    boxes: tuple[Box, ...]


def box_text(box: Box, step: int = 1) -> str:
    """A box as text; numbers are rounded to multiples of `step`."""
    x0, y0, x1, y1 = (round(value * SCALE / step) * step for value in box)
    return f"<box>({x0},{y0}),({x1},{y1})</box>"


def grounded_text(phrase: str, boxes: Sequence[Box], step: int = 1) -> str:
    """A phrase and its boxes as text."""
    return f"<ref>{phrase}</ref>" + "".join(box_text(box, step) for box in boxes)


def box_of(text: str) -> Box | None:
    """The first box in a text; None where there is none."""
    numbers = re.search(_BOX, text)
    return None if numbers is None else _scaled(numbers.groups())


def parse(text: str, sample: str) -> list[Grounded]:
    """All phrases and boxes of a text, in order.

    Raises:
        ValueError: naming `sample` and what is wrong, for marks that do not fit together, a box
            outside the picture, and one whose corners are swapped.
    """
    rest = _PIECE.sub("", text)
    if mark := _MARK.search(rest):
        fault = f"{mark[0]} without its other half, or a box that is not (x0,y0),(x1,y1)"
        raise ValueError(f"sample {sample}: {fault}: {text!r}")
    found: list[Grounded] = []
    end = 0
    for piece in _PIECE.finditer(text):
        if piece["phrase"] is not None:
            found.append(Grounded(piece["phrase"], ()))
        else:
            box = check_box(_scaled(piece.groups()[1:]), sample)
            # Boxes belong to the phrase that stands right before them.
            follows = found and piece.start() == end
            last = found.pop() if follows else Grounded(None, ())
            found.append(Grounded(last.phrase, (*last.boxes, box)))
        end = piece.end()
    return found


def check_box(box: Box, sample: str) -> Box:
    """The box, if it lies in its picture.

    Raises:
        ValueError: naming `sample` and the box.
    """
    x0, y0, x1, y1 = box
    if not all(0 <= value <= 1 for value in box):
        raise ValueError(f"sample {sample}: the box {box_text(box)} lies outside its picture")
    if x0 > x1 or y0 > y1:
        swapped = f"the corners of the box {box_text(box)} are swapped"
        raise ValueError(f"sample {sample}: {swapped}; left, top comes first")
    return box


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1; an empty box overlaps nothing."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    total = sum(max(0.0, x1 - x0) * max(0.0, y1 - y0) for x0, y0, x1, y1 in (a, b)) - shared
    return shared / total if total > 0 else 0.0


def _scaled(numbers: Sequence[str]) -> Box:
    x0, y0, x1, y1 = (int(number) / SCALE for number in numbers)
    return x0, y0, x1, y1
