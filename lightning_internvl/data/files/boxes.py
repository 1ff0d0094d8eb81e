"""Boxes in text: "<box>(x0,y0),(x1,y1)</box>" as Qwen-VL, "<box>[[x0, y0, x1, y1]]</box>" as InternVL."""

from __future__ import annotations

import re

from lightning_internvl.data.bad_samples import BadSample

BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
LARGEST = 1000  # of the numbers of a box


def check_boxes(text: str) -> None:
    """Boxes in text have numbers from 0 to 1000: "(x0,y0),(x1,y1)" or "[[x0, y0, x1, y1]]".

    Raises:
        BadSample: for a box that lies outside, has swapped corners, or is none.
    """
    if "box>" not in text:
        return
    rest = BOX.sub("", text)
    if "<box>" in rest or "</box>" in rest:
        raise BadSample(f"<box> or </box> without its other half: {text!r:.200}", "box")
    for box in BOX.findall(text):
        numbers = [float(number) for number in NUMBER.findall(box)]
        if not numbers or len(numbers) % 4:
            wrong = f"{len(numbers)} numbers, not left, top, right, bottom"
            raise BadSample(f"the box {box!r:.100} has {wrong}", "box")
        if not all(0 <= number <= LARGEST for number in numbers):
            raise BadSample(f"the box {box!r:.100} lies outside its picture (0 to {LARGEST})", "box")
        for x0, y0, x1, y1 in zip(*(numbers[i::4] for i in range(4)), strict=True):
            if x0 > x1 or y0 > y1:
                raise BadSample(f"the corners of the box {box!r:.100} are swapped; left, top comes first", "box")
