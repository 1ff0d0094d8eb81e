"""MMBench: questions that count only where a model is right in every order of their options (Liu et
al., 2024, arXiv:2307.06281)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from lightning_internvl.evaluation.answer_task import Case, beside_chance
from lightning_internvl.evaluation.benchmark_files import field
from lightning_internvl.evaluation.benchmark_tables import Row, read_rows
from lightning_internvl.evaluation.metrics.option_letters import letter_of_vlmevalkit
from lightning_internvl.evaluation.multiple_choice import Choice, MultipleChoice, choice_of, options_of, picture_of
from lightning_internvl.inference.predictor import Metrics, Predictor

COPY = 1_000_000  # by which the index of a question in another order of its options is higher


class MMBench(MultipleChoice):
    """Accuracy by circular evaluation, over all and by the two levels of abilities, and that of the
    questions as they are (`accuracy_plain`). Answers are read by VLMEvalKit's rules without a judge.

    Args:
        path: the TSV of the set; copies of a question in other orders have its index plus a
            multiple of 1,000,000.
        circular: whether a question counts only where all its orders are right: those of the file
            or, where it has none, all rotations of its options.
    """

    def __init__(self, *, circular: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.circular = circular
        self._orders: dict[int, int] = {}

    def cases(self, predictor: Predictor) -> list[Case]:
        assert self.path is not None  # as the constructor has seen
        groups: dict[int, list[Case]] = {}
        for row in read_rows(self.path):
            case = self._case(row)
            groups.setdefault(_question(case), []).append(case)
        for own in groups.values():
            own.sort(key=lambda case: int(case.key))
        if not self.circular:
            groups = {number: own[:1] for number, own in groups.items()}
        elif all(len(own) == 1 for own in groups.values()):
            groups = {number: _rotations(own[0]) for number, own in groups.items()}
        self._orders = {number: len(own) for number, own in groups.items()}
        return [case for own in groups.values() for case in own]

    def _case(self, row: Row) -> Case:
        key = str(field(row.values, ("index",), row.place))
        if not key.isdecimal():
            raise ValueError(f"{row.place}: the index {key!r} is no number")
        options = options_of(row)
        question = str(field(row.values, ("question",), row.place))
        if hint := row.values.get("hint"):
            question = f"{hint}\n{question}"
        groups = [str(row.values[name]) for name in ("category",) if name in row.values]
        part = str(row.values.get("l2-category", ""))
        truth = choice_of(options, row.values.get("answer"), row.place)
        return Case(key, picture_of(row), question, truth, part, groups=tuple(groups))

    def letter(self, case: Case, answer: str) -> str:
        return letter_of_vlmevalkit(answer, case.truth.options)

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        if not self.circular:
            return super().score(cases, answers, predictor)
        groups: dict[int, list[int]] = {}
        for place, case in enumerate(cases):
            groups.setdefault(_question(case), []).append(place)
        whole = {number: own for number, own in groups.items() if len(own) == self._orders[number]}
        for number in groups.keys() - whole.keys():
            predictor.journal.add_missing(str(number), "one of the orders of its options")
        if not whole:
            raise ValueError("no question was answered in all orders of its options; raise samples")
        first, grades = [cases[own[0]] for own in whole.values()], self.grades(cases, answers)
        *said, drawn = self.blind_grades(cases)
        blind = [_of_all(row, whole) for row in said] + [[prod(drawn[place] for place in own) for own in whole.values()]]
        plain = [[row[own[0]] for own in whole.values()] for row in (grades, *said, drawn)]
        return {
            **beside_chance("accuracy", first, _of_all(grades, whole), blind),
            **beside_chance("accuracy_plain", [replace(case, part="", groups=()) for case in first], plain[0], plain[1:]),
            **self.shares_read(cases, answers),
            "questions": len(whole),
            "samples": sum(map(len, whole.values())),
        }


def _question(case: Case) -> int:
    return int(case.key) % COPY


def _of_all(grades: Sequence[float], groups: Mapping[int, Sequence[int]]) -> list[float]:
    """1 for a question all of whose orders are right, else 0."""
    return [min(grades[place] for place in own) for own in groups.values()]


def _rotations(case: Case) -> list[Case]:
    """A question and its copies, each with the options moved up by one more place."""
    if case.truth is None:
        return [case]
    letters, texts = list(case.truth.options), list(case.truth.options.values())
    right, found = letters.index(case.truth.right), []
    for step in range(len(letters)):
        options = dict(zip(letters, texts[step:] + texts[:step], strict=True))
        truth = Choice(options, letters[(right - step) % len(letters)])
        found.append(replace(case, key=str(int(case.key) + step * COPY), truth=truth))
    return found
