"""How MMMU reads answers (MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py), to the letter."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

SEED = 42  # of the draws for answers that choose nothing
LONG = 5  # words, above which the text of an option counts
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NO_ANSWER = (":", ",", ".", "!", "?", ";", "'")


def chosen_letter(answer: str, options: Mapping[str, str]) -> str:
    """The letter of an answer, "(B)" before " B " before the text of an option, the last of
    several; "" where it chooses none, for which the official script draws one.

    Args:
        options: texts by letter.
    """
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        answer = answer.strip(mark)
    answer = f" {answer} "
    for form in ("({})", " {} "):
        places = {letter: answer.rfind(form.format(letter)) for letter in options}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    if len(answer.split()) > LONG:
        lower = answer.lower()
        places = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    return ""


def draws() -> random.Random:
    """Where the letters of answers that choose nothing come from, one after the other."""
    return random.Random(SEED)


def is_open_answer_right(answer: str, truths: Sequence[str]) -> bool:
    """Whether what an answer says at last, or a number in it, is one of the true answers: equal
    numbers to two decimals, or a true text within it."""
    true = [form for truth in truths for form in _forms(truth)]
    texts = [form for form in true if isinstance(form, str)]
    for found in _said(answer):
        if isinstance(found, str):
            if any(text in found for text in texts):
                return True
        elif found in true:
            return True
    return False


def _said(answer: str) -> list[str | float]:
    parts = _key_parts(answer)
    numbers = [number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)]
    return [form for text in (*parts, *numbers) for form in _forms(text)]


def _key_parts(answer: str) -> list[str]:
    """Of each line the shortest text behind a word that leads to an answer; the whole answer where
    there is none."""
    answer = answer.strip().strip(".").lower()
    lines, found = answer.split("\n"), []
    for place, line in enumerate(lines):
        leads = (*_LEADS, "=") if place == len(lines) - 1 else _LEADS
        best = ""
        for tail in (line.split(lead)[-1].strip() for lead in leads if lead in line):
            best = tail if not best or len(tail) < len(best) else best
        if best and best not in _NO_ANSWER:
            found.append(best)
    return found or [answer]


def _forms(text: str) -> list[str | float]:
    """A number to two decimals, or a text in lower case; one letter only beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
