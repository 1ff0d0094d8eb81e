"""What all tasks share whose questions come with options."""

from __future__ import annotations

import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning_internvl.evaluation.answer_task import COMMON, AnswerTask, Case
from lightning_internvl.evaluation.benchmark_tables import Row
from lightning_internvl.evaluation.shown_pictures import StoredPicture
from lightning_internvl.inference.predictor import Metrics, Predictor

ASK_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Choice:
    """Options by their letters, and the letter of the right one."""

    options: Mapping[str, str]
    right: str


class MultipleChoice(AnswerTask):
    """A task whose questions come with options. The score is the share of right letters; chance is
    the better of a letter that is drawn and the letter or text that is right most often.

    Args:
        prompt: what is asked; {question} and {options} stand for those of the set.
        option: a line of the options; {letter} and {text} stand for its own.
    """

    PROMPT = "{question}\n{options}\n" + ASK_LETTER
    OPTION: ClassVar[str] = "{letter}. {text}"

    def __init__(self, *, option: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        needs_path(self.path, type(self).__name__)
        self.option = option or self.OPTION
        if "{letter}" not in self.option or "{text}" not in self.option:
            raise ValueError(f"option={option!r} has no place for {{letter}} or {{text}}; write both")
        if "{options}" not in self.prompt and "{options}" in self.PROMPT:
            raise ValueError(f"prompt={self.prompt!r} has no place for the options; write {{options}} there")

    @abstractmethod
    def letter(self, case: Case, answer: str) -> str:
        """The letter that an answer chooses; "" where it chooses none."""

    def judge(self, case: Case, answer: str) -> float:
        return float(self.letter(case, answer) == case.truth.right)

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        return {**super().score(cases, answers, predictor), **self.shares_read(cases, answers)}

    def shares_read(self, cases: Sequence[Case], answers: Sequence[str]) -> Metrics:
        """The share of answers that choose an option."""
        read = [self.letter(case, answer) in case.truth.options for case, answer in zip(cases, answers, strict=True)]
        return {"answers_with_option": sum(read) / len(read)}

    def blind_grades(self, cases: Sequence[Case]) -> list[Sequence[float]]:
        return [*super().blind_grades(cases), [self.drawn(case) for case in cases]]

    def drawn(self, case: Case) -> float:
        """What an option that is drawn gets on average."""
        return 1 / len(case.truth.options)

    def constants(self, cases: Sequence[Case]) -> Sequence[str]:
        letters = Counter(letter for case in cases for letter in case.truth.options)
        texts = Counter(case.truth.options.get(case.truth.right, "") for case in cases)
        return [*letters, *(text for text, _ in texts.most_common(COMMON) if text)]

    def truth_text(self, case: Case) -> str:
        return f"{case.truth.right}. {case.truth.options.get(case.truth.right, '')}"

    def _prompt_for(self, case: Case) -> str:
        options = case.truth.options.items() if case.truth else ()
        lines = [fill(self.option, {"letter": letter, "text": text}) for letter, text in options if text]
        prompt = self.prompt if lines else self.prompt.replace("{options}\n", "")
        return fill(prompt, {"question": case.question, "options": "\n".join(lines)})


def fill(prompt: str, texts: Mapping[str, str]) -> str:
    """A prompt with texts in their places, {NAME}; what is put there is not looked into again."""
    return re.sub(r"\{(\w+)\}", lambda place: texts.get(place[1], place[0]), prompt)


def needs_path(path: Path | None, name: str) -> None:
    """Raises ValueError where a task that has no built-in scenes is given no file."""
    if path is None:
        raise ValueError(f"path=null: {name} asks the questions of its own files and has no built-in ones; give path=")


def lettered(texts: Sequence[Any]) -> dict[str, str]:
    """Options by the letters A, B, ..."""
    return dict(zip(string.ascii_uppercase, map(str, texts), strict=False))


def options_of(row: Row) -> dict[str, str]:
    """The options of a row with a column a letter, those that are empty left out.

    Raises:
        ValueError: if it has fewer than two.
    """
    found = {letter: str(row.values[letter]) for letter in string.ascii_uppercase if letter in row.values}
    if len(found) < 2:
        raise ValueError(f"{row.place} has fewer than two options in columns A, B, ...; it has {', '.join(row.values)}")
    return found


def choice_of(options: Mapping[str, str], right: Any, place: str) -> Choice | None:
    """The truth of a question; None where the set keeps it back.

    Raises:
        ValueError: for an answer that is no letter of an option.
    """
    if right is None or not str(right).strip():
        return None
    letter = str(right).strip()
    if letter not in options:
        raise ValueError(f"{place}: the answer {letter!r} is none of the options {', '.join(options)}")
    return Choice(options, letter)


def picture_of(row: Row, column: str = "image") -> StoredPicture:
    """The picture of a row; raises ValueError naming it where there is none."""
    if column not in row.pictures:
        raise ValueError(f"{row.place} has no picture in {column!r}; its columns are {', '.join((*row.values, *row.pictures))}")
    return row.pictures[column]
