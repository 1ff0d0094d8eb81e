"""How MathVista reads answers (lupantech/MathVista, evaluation/extract_answer.py and
calculate_score.py).

The official extraction takes an answer as it is where it is empty, one of the choices, a number of
the wanted type or 'The answer is "...".' (--quick_extract), and gives every other one to GPT-4 to
find the final answer in it. Here rules stand for that judge (`by_rule`); all before and after is
followed to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_internvl.evaluation.metrics.edit_distance import edit_distance

_QUICK = re.compile(r'The answer is "(.*)"\.')
_BRACKETS = re.compile(r"\(([a-zA-Z])\)")
_SAID = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\W{0,2}([A-Z])\b(?!['’])", re.IGNORECASE)
_ALONE = re.compile(r"\W*([A-Z])(?:\W*|[.:)]\s.*|\n.*)", re.DOTALL)
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+(?:[eE][+-]?\d+)?")
_SAID_NUMBER = re.compile(rf"answer(?:\s+is)?\s*:?\s*\W{{0,2}}?({_NUMBER.pattern})", re.IGNORECASE)
_WORDS = {
    word: str(value)
    for value, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
_LIST = re.compile(r"\[[^\[\]]*\]")


@dataclass(frozen=True)
class Problem:
    """What an answer is read and judged by.

    Attributes:
        choices: of a question with several; empty otherwise.
        kind: "text", "integer", "float" or "list", of the answer.
        precision: decimals of a float.
    """

    answer: str
    choices: tuple[str, ...] = ()
    kind: str = "text"
    precision: int = 0


def extracted(answer: str, problem: Problem) -> str | None:
    """The final answer in an answer where no judge is needed to find it; None where one is."""
    if not answer or (problem.choices and answer in problem.choices):
        return answer
    try:
        if problem.kind == "integer":
            return str(int(answer))
        if problem.kind == "float":
            return str(float(answer))
    except ValueError:
        pass
    found = _QUICK.search(answer)
    return found[1] if found else None


def by_rule(answer: str, problem: Problem) -> str:
    """What a judge would find: of choices the last letter in brackets, then the last behind
    "answer", "option" or "choice", then one that stands alone or first, then the choice named last;
    of numbers the last behind "answer", then the last, then the last in words; or the last list in
    square brackets. Empty where there is none."""
    if problem.choices:
        return _letter(answer, problem.choices)
    if problem.kind == "list":
        return (_LIST.findall(answer) or [""])[-1]
    numbers = _SAID_NUMBER.findall(answer) or _NUMBER.findall(answer)
    words = [_WORDS[word] for word in re.findall(r"\w+", answer.lower()) if word in _WORDS]
    return (numbers or words or [""])[-1].replace(",", "")


def _letter(answer: str, choices: Sequence[str]) -> str:
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    named = [letter.upper() for letter in _BRACKETS.findall(answer) if letter.upper() in letters]
    named = named or [letter for letter in _SAID.findall(answer) if letter in letters]
    if not named and (alone := _ALONE.fullmatch(answer)) and alone[1] in letters:
        named = [alone[1]]
    if not named:
        lower = answer.lower()
        ends = {
            letter: (found.end(), len(text))
            for letter, text in zip(letters, choices, strict=True)
            for found in re.finditer(rf"(?<!\w){re.escape(text.lower())}(?!\w)", lower)
            if text
        }
        named = [max(ends, key=ends.__getitem__)] if ends else []
    return named[-1] if named else ""


def is_right(extraction: str, problem: Problem) -> bool:
    """Whether an extracted answer, put into the form of its type, equals the true one."""
    return _normalised(extraction, problem) == problem.answer


def _normalised(extraction: str, problem: Problem) -> str | None:
    if problem.choices:
        extraction = extraction.strip()
        if letter := _BRACKETS.search(extraction):
            extraction = letter[1].upper()
        place = ord(extraction) - ord("A") if len(extraction) == 1 else -1
        if 0 <= place < len(problem.choices):
            return problem.choices[place]
        return min(problem.choices, key=lambda choice: edit_distance(extraction, choice))
    try:
        if problem.kind == "integer":
            return str(int(float(extraction)))
        if problem.kind == "float":
            return str(round(float(extraction), problem.precision))
    except (ValueError, OverflowError):
        return None
    return extraction
