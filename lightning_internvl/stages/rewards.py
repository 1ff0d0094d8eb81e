"""What an answer is worth, by rules: a function each, of the answer, the true answer and what was asked.

An own function has the same form and may lie anywhere: `_target_: my_package.my_module.my_reward`,
`_partial_: true`. Its further parameters are settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lightning_internvl.data import grounding
from lightning_internvl.data.grounding import Box, overlap
from lightning_internvl.messages import did_you_mean

Asked = Mapping[str, Any]  # "key" of the sample, and "conversation" up to the question, as messages
Reward = Callable[[str, str, Asked], float]

SHOWN = 200  # characters of an answer in a message
NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
ZERO = ("zero", "none", "nothing")
_NUMBER = re.compile(rf"-?\d+(?:[.,]\d+)?|\b(?:{'|'.join((*NUMBERS, *ZERO))})\b", re.IGNORECASE)


def exact_answer(answer: str, truth: str, asked: Asked) -> float:
    """1 for the true answer, whatever its capitals, spaces and a point at its end; else 0."""
    return float(_plain(answer) == _plain(truth))


def count(answer: str, truth: str, asked: Asked) -> float:
    """1 if the first number of the answer is that of the truth, as digits or as an English word up to
    twenty; else 0. Raises ValueError for a truth without a number."""
    wanted = _number(truth)
    if wanted is None:
        raise ValueError(f"the true answer {truth!r:.{SHOWN}} has no number")
    return float(_number(answer) == wanted)


def box_overlap(answer: str, truth: str, asked: Asked) -> float:
    """How well the boxes of an answer cover the true ones, from 0 to 1: intersection over union, each
    true box with the nearest one that is left, over the larger number of boxes. 0 for boxes that
    are none; raises ValueError for a truth without a box.

    Boxes are written as "<box>(x0,y0),(x1,y1)</box>", in 0..1000 (see `data.grounding`).
    """
    wanted = _boxes(truth, asked["key"])
    if not wanted:
        raise ValueError(f"the true answer {truth!r:.{SHOWN}} has no box")
    try:
        given = _boxes(answer, asked["key"])
    except ValueError:
        return 0.0
    pairs = sorted(((overlap(a, b), i, j) for i, a in enumerate(wanted) for j, b in enumerate(given)), reverse=True)
    total, met, used = 0.0, set[int](), set[int]()
    for shared, i, j in pairs:
        if i not in met and j not in used:
            total, met, used = total + shared, met | {i}, used | {j}
    return total / max(len(wanted), len(given))


def answer_format(answer: str, truth: str, asked: Asked, *, pattern: str) -> float:
    """1 if the whole answer has the form of a regular expression, in which a point is any character;
    else 0. As in "<think>.*</think>.+": thoughts, and behind them an answer."""
    return float(re.fullmatch(pattern, answer, re.DOTALL) is not None)


def checked_weights(rewards: Mapping[str, Reward], weights: Mapping[str, float] | None, setting: str) -> dict[str, float]:
    """The weight of each function, 1 where none is given.

    Args:
        setting: under which they stand, for messages.

    Raises:
        ValueError: without functions; for what is no function; for weights of others or that are
            no numbers.
    """
    if not rewards:
        raise ValueError(f"{setting}.rewards names no function, so that no answer is better than another; give one or more")
    for name, function in rewards.items():
        if not callable(function):
            form = "{_target_: package.module.function, _partial_: true}"
            raise ValueError(f"{setting}.rewards.{name}={function!r:.80} is no function; give {form}")
    for name, weight in (weights or {}).items():
        if name not in rewards:
            raise ValueError(f"{setting}.reward_weights has {name!r}; {did_you_mean(name, list(rewards))}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"{setting}.reward_weights.{name}={weight!r:.80} must be a number")
    return {name: float((weights or {}).get(name, 1.0)) for name in rewards}


def reward_of(name: str, function: Reward, answer: str, truth: str, asked: Asked) -> float:
    """What a function says.

    Raises:
        ValueError: naming function, sample and answer where it raises, or says no finite number.
    """
    where = f"reward {name}: sample {asked['key']}, answer {answer!r:.{SHOWN}}"
    try:
        found = function(answer, truth, asked)
    except Exception as error:  # of any kind: it may be the user's own
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: it gave {found!r:.80}, which is no number") from error
    if not math.isfinite(value):
        raise ValueError(f"{where}: it gave {value}; a reward must be a finite number")
    return value


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _number(text: str) -> float | None:
    found = _NUMBER.search(text)
    if found is None:
        return None
    word = found[0].lower()
    if word in ZERO:
        return 0.0
    return float(NUMBERS.index(word)) if word in NUMBERS else float(word.replace(",", "."))


def _boxes(text: str, key: str) -> list[Box]:
    return [box for one in grounding.parse(text, key) for box in one.boxes]
