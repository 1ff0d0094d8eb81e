"""AI2D: questions about diagrams of school books (Kembhavi et al., 2016, arXiv:1603.07396)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_internvl.evaluation.answer_task import Case
from lightning_internvl.evaluation.benchmark_files import field
from lightning_internvl.evaluation.benchmark_tables import Row, read_rows
from lightning_internvl.evaluation.metrics.option_letters import letter_of_vlmevalkit
from lightning_internvl.evaluation.multiple_choice import MultipleChoice, choice_of, lettered, options_of, picture_of
from lightning_internvl.inference.predictor import Predictor


class AI2D(MultipleChoice):
    """Accuracy, over all and by kind of diagram where the file says it. Answers are read by
    VLMEvalKit's rules without a judge.

    Args:
        path: the TSV of VLMEvalKit (AI2D_TEST.tsv), or parquet with "question", "options", the
            number of the right one from 0 on in "answer", and "image".
    """

    def cases(self, predictor: Predictor) -> list[Case]:
        assert self.path is not None  # as the constructor has seen
        return [self._case(number, row) for number, row in enumerate(read_rows(self.path))]

    def _case(self, number: int, row: Row) -> Case:
        listed = row.values.get("options")
        options = options_of(row) if listed is None else lettered(listed)
        answer = row.values.get("answer")
        if listed is not None and answer is not None:
            answer = _letter_of_number(answer, options, row.place)
        question = str(field(row.values, ("question",), row.place))
        truth = choice_of(options, answer, row.place)
        return Case(str(row.values.get("index", number)), picture_of(row), question, truth, str(row.values.get("category", "")))

    def letter(self, case: Case, answer: str) -> str:
        return letter_of_vlmevalkit(answer, case.truth.options)


def _letter_of_number(answer: Any, options: Mapping[str, str], place: str) -> str:
    if not str(answer).isdecimal() or int(answer) >= len(options):
        raise ValueError(f"{place}: the answer {answer!r} is no number of its {len(options)} options, from 0 on")
    return list(options)[int(answer)]
