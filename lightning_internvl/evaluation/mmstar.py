"""MMStar: 1,500 questions that cannot be answered without their picture (Chen et al., 2024,
arXiv:2403.20330)."""

from __future__ import annotations

from lightning_internvl.evaluation.answer_task import Case
from lightning_internvl.evaluation.benchmark_files import field
from lightning_internvl.evaluation.benchmark_tables import Row, read_rows
from lightning_internvl.evaluation.metrics.option_letters import letter_of_mmstar
from lightning_internvl.evaluation.multiple_choice import MultipleChoice, choice_of, options_of, picture_of
from lightning_internvl.inference.predictor import Predictor

LETTERS = "ABCD"  # of every question


class MMStar(MultipleChoice):
    """Accuracy over all, by core capability and by detailed axis. The letter of an answer is the one
    that it begins with, as in the official script.

    Args:
        path: the parquet or TSV of the set, with the options in the question or in columns A to D.
    """

    def cases(self, predictor: Predictor) -> list[Case]:
        assert self.path is not None  # as the constructor has seen
        return [self._case(row) for row in read_rows(self.path)]

    def _case(self, row: Row) -> Case:
        key, question = field(row.values, ("index",), row.place), field(row.values, ("question",), row.place)
        options = options_of(row) if "A" in row.values else dict.fromkeys(LETTERS, "")
        part = str(field(row.values, ("category",), row.place))
        groups = [str(row.values[name]) for name in ("l2_category", "l2-category") if name in row.values]
        truth = choice_of(options, row.values.get("answer"), row.place)
        return Case(str(key), picture_of(row), str(question), truth, part, groups=tuple(groups))

    def letter(self, case: Case, answer: str) -> str:
        return letter_of_mmstar(answer)
