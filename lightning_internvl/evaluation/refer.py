"""Finding what a phrase speaks of (RefCOCO, RefCOCO+, RefCOCOg), by a box in text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_internvl.data.grounding import SCALE, Box, box_text, overlap
from lightning_internvl.evaluation.answer_task import BUILT_IN, AnswerTask, Case
from lightning_internvl.evaluation.benchmark_files import field, picture_in, read_lines
from lightning_internvl.evaluation.scene_cases import grounding_cases
from lightning_internvl.evaluation.tasks import Metrics
from lightning_internvl.inference.predictor import Predictor

_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
# <box>(x0,y0),(x1,y1)</box>.
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")
_LIST = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")  # <box>[[x0, y0, x1, y1]]</box>
IOU = 0.5
AT_A_TIME = 100  # boxes that are compared with all true ones
GRID, SAMPLED = 10, 200  # of boxes that stand for a model which sees nothing: parts of a side, true ones


class Referring(AnswerTask):
    """The share of phrases whose box overlaps the true one by half (IoU of 0.5) or more. The first
    box of an answer counts, and an answer without one is wrong.

    Args:
        scale: what stands for the right and the lower edge of a picture in the boxes of answers.
        path: JSON lines with "image", "sent" (or "expression"), "bbox" (left, top, right, bottom in
            pixels), "width", "height".
    """

    PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{question}</ref>"
    SCENES_PROMPT = "where is {question}?"

    def __init__(self, *, scale: float = SCALE, **options: Any) -> None:
        super().__init__(**options)
        if scale <= 0:
            raise ValueError(f"{scale=} must be above 0; 1000 for boxes in 0..1000")
        self.scale = scale

    def cases(self, predictor: Predictor) -> list[Case]:
        if self.path is None:
            return grounding_cases(predictor.held_out, self.samples or BUILT_IN)
        cases = []
        for place, record in read_lines(self.path):
            picture = picture_in(self.images, field(record, ("image", "img_path"), place))
            x0, y0, x1, y1 = field(record, ("bbox",), place)
            width, height = field(record, ("width",), place), field(record, ("height",), place)
            phrase, number = field(record, ("sent", "expression"), place), place.rpartition(":")[2]
            cases.append(Case(number, picture, phrase, (x0 / width, y0 / height, x1 / width, y1 / height)))
        return cases

    def judge(self, case: Case, answer: str) -> float:
        box = first_box(answer, self.scale)
        return float(box is not None and overlap(box, case.truth) >= IOU)

    def truth_text(self, case: Case) -> str:
        return box_text(case.truth)

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        right = [self.judge(case, answer) for case, answer in zip(cases, answers, strict=True)]
        boxes = [first_box(answer) is not None for answer in answers]
        return {
            "accuracy_at_0.5": sum(right) / len(right),
            "accuracy_at_0.5_chance": best_single_box([case.truth for case in cases]),
            "answers_with_box": sum(boxes) / len(boxes),
        }


def best_single_box(truths: Sequence[Box]) -> float:
    """The share of true boxes that the best box finds which is the same for every picture: one of
    the true ones, or one whose edges lie at tenths of the picture."""
    edges = [(low / GRID, high / GRID) for low in range(GRID) for high in range(low + 1, GRID + 1)]
    grid = [(x0, y0, x1, y1) for x0, x1 in edges for y0, y1 in edges]
    boxes, true, best = np.array([*grid, *truths[:SAMPLED]])[:, None], np.array(truths), 0.0
    for start in range(0, len(boxes), AT_A_TIME):
        some = boxes[start : start + AT_A_TIME]
        sides = np.minimum(true[:, 2:], some[..., 2:]) - np.maximum(true[:, :2], some[..., :2])
        shared = np.maximum(sides, 0).prod(axis=-1)
        total = np.maximum(true[:, 2:] - true[:, :2], 0).prod(axis=-1) + (some[..., 2:] - some[..., :2]).prod(axis=-1) - shared
        best = max(best, float(((shared >= IOU * total) & (total > 0)).mean(axis=1).max()))
    return best


def first_box(text: str, scale: float = SCALE) -> Box | None:
    """The first box in a text, in 0..1: numbers are in 0..`scale`; four that are together below 4
    are shares already."""
    found = min(filter(None, (_CORNERS.search(text), _LIST.search(text))), key=lambda match: match.start(), default=None)
    if found is None:
        return None
    numbers = [float(number) for number in found.groups()]
    x0, y0, x1, y1 = numbers if sum(numbers) < 4 else (number / scale for number in numbers)
    return x0, y0, x1, y1
