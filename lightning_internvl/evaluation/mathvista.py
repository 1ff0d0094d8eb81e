"""MathVista: mathematics in pictures (Lu et al., 2024, arXiv:2310.02255)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.evaluation.answer_task import AnswerTask, Case
from lightning_internvl.evaluation.benchmark_files import field, picture_in, read_whole
from lightning_internvl.evaluation.benchmark_tables import read_rows
from lightning_internvl.evaluation.metrics.mathvista_answers import Problem, by_rule, extracted, is_right
from lightning_internvl.evaluation.multiple_choice import lettered, needs_path
from lightning_internvl.evaluation.shown_pictures import Picture
from lightning_internvl.inference.predictor import Metrics, Predictor

KINDS = ("text", "integer", "float", "list")
_HINT = "Hint: Please answer the question {} at the end."
_WANTED = {
    "text": "and provide the correct option letter, e.g., A, B, C, D,",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3,",
    "float1": "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4,",
    "float2": "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45,",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4],",
}


class MathVista(AnswerTask):
    """Accuracy over all, by task and by skill. The final answer is found by rules where the official
    script asks a language model (see `metrics.mathvista_answers`); `answers_by_rule` is the share of
    such answers.

    Args:
        path: testmini.json of the set's repository, or its parquet.
    """

    PROMPT = "{question}"  # with the hint on the form of the answer, and the choices

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        needs_path(self.path, "MathVista")

    def cases(self, predictor: Predictor) -> list[Case]:
        assert self.path is not None  # as the constructor has seen
        records = _stored(self.path) if self.path.suffix == ".parquet" else self._listed(self.path)
        return [self._case(place, record, picture) for place, record, picture in records]

    def _listed(self, path: Path) -> Iterator[tuple[str, Mapping[str, Any], Picture]]:
        found = read_whole(path)
        if not isinstance(found, Mapping) or not all(isinstance(one, Mapping) for one in found.values()):
            raise ValueError(f"{path} holds no problems by their pid")
        for pid, record in found.items():
            place = f"{path}: problem {pid}"
            yield place, {"pid": pid, **record}, picture_in(self.images, field(record, ("image",), place))

    @staticmethod
    def _case(place: str, record: Mapping[str, Any], picture: Picture) -> Case:
        kind, choices = str(field(record, ("answer_type",), place)), tuple(map(str, record.get("choices") or ()))
        if kind not in KINDS:
            raise ValueError(f"{place}: answer_type {kind!r} is not known; valid choices: {', '.join(KINDS)}")
        precision, answer = int(record.get("precision") or 0), record.get("answer")
        truth = Problem(str(answer), choices, kind, precision) if answer not in (None, "") else None
        about = record.get("metadata") or {}
        question = record.get("query") or _query(record, choices, kind, precision, place)
        pid = str(field(record, ("pid",), place))
        return Case(pid, picture, question, truth, str(about.get("task", "")), groups=tuple(about.get("skills") or ()))

    def judge(self, case: Case, answer: str) -> float:
        found = extracted(answer, case.truth)
        return float(is_right(by_rule(answer, case.truth) if found is None else found, case.truth))

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        ruled = sum(extracted(answer, case.truth) is None for case, answer in zip(cases, answers, strict=True))
        return {**super().score(cases, answers, predictor), "answers_by_rule": ruled / len(cases)}

    def blind_grades(self, cases: Sequence[Case]) -> list[Sequence[float]]:
        drawn = [1 / len(case.truth.choices) if case.truth.choices else 0.0 for case in cases]
        return [*super().blind_grades(cases), drawn]

    def constants(self, cases: Sequence[Case]) -> Sequence[str]:
        letters = Counter(letter for case in cases for letter in lettered(case.truth.choices))
        return [*letters, *super().constants(cases)]

    def true_answers(self, case: Case) -> Sequence[str]:
        return [case.truth.answer]

    def truth_text(self, case: Case) -> str:
        return case.truth.answer


def _stored(path: Path) -> Iterator[tuple[str, Mapping[str, Any], Picture]]:
    for row in read_rows(path):
        if not row.pictures:
            raise ValueError(f"{row.place} has no picture in decoded_image; its columns are {', '.join(row.values)}")
        yield row.place, row.values, next(iter(row.pictures.values()))


def _query(record: Mapping[str, Any], choices: Sequence[str], kind: str, precision: int, place: str) -> str:
    """The published question with a hint on its form, as in data/query.json."""
    question = str(field(record, ("question",), place))
    if record.get("unit"):
        question += f" (Unit: {record['unit']})"
    wanted = _WANTED.get(f"{kind}{precision}" if kind == "float" else kind, "")
    lines = [_HINT.format(wanted) if wanted else "", f"Question: {question}"]
    if choices:
        lines += ["Choices:", *(f"({letter}) {text}" for letter, text in lettered(choices).items())]
    return "\n".join(filter(None, lines)).strip()
