"""MMMU: questions of college subjects with pictures in their text (Yue et al., 2024,
arXiv:2311.16502)."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning_internvl.data.templates import IMAGE
from lightning_internvl.evaluation.answer_task import COMMON, Case
from lightning_internvl.evaluation.benchmark_files import field
from lightning_internvl.evaluation.benchmark_tables import Row, files_of, read_rows
from lightning_internvl.evaluation.metrics.mmmu_answers import chosen_letter, draws, is_open_answer_right
from lightning_internvl.evaluation.multiple_choice import MultipleChoice, choice_of, fill, lettered
from lightning_internvl.inference.predictor import Metrics, Predictor

DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": ("Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"),
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials Mechanical_Engineering"
    ),
}
_OF_SUBJECT = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}
_MARK = re.compile(r"<image (\d+)>")
OPEN = "Answer the question using a single word or phrase."


class MMMU(MultipleChoice):
    """The share of right answers, over all, by subject and by discipline. Answers are read as the
    official script reads them: one that chooses no option gets a drawn one, from the official seed
    in the order of the set. Open questions are right where what is said at last is a true answer.

    Args:
        path: a parquet file, or the folder of the set with a folder a subject.
        split: of a folder, as its files are named.
        open_prompt: what is asked where there are no options.
    """

    PROMPT = "{question}\n{options}\n\nAnswer with the option's letter from the given choices directly."
    OPTION = "({letter}) {text}"

    def __init__(self, *, split: str = "validation", open_prompt: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.split = split
        self.open_prompt = open_prompt or "{question}\n" + OPEN
        if "{question}" not in self.open_prompt:
            raise ValueError(f"{open_prompt=} has no place for the question; write {{question}} there")

    def cases(self, predictor: Predictor) -> list[Case]:
        assert self.path is not None  # as the constructor has seen
        files = files_of(self.path, f"{self.split}-*.parquet")
        return [self._case(row) for file in files for row in read_rows(file)]

    def _case(self, row: Row) -> Case:
        key, question = str(field(row.values, ("id",), row.place)), str(field(row.values, ("question",), row.place))
        subject = "_".join(key.split("_")[1:-1])
        answer = row.values.get("answer")
        if field(row.values, ("question_type",), row.place) == "multiple-choice":
            options = lettered(self._listed(field(row.values, ("options",), row.place), row.place, "options"))
            # "?" stands for answers that are kept back, as in the test split
            truth: Any = choice_of(options, None if answer == "?" else answer, row.place)
        else:
            truth = None if answer in (None, "?") else self._open(str(answer))
        first = next(iter(row.pictures.values()), None)
        if first is None:
            raise ValueError(f"{row.place} has no picture in image_1, ...; its columns are {', '.join(row.values)}")
        case = Case(key, first, question, truth, subject, groups=tuple(filter(None, [_OF_SUBJECT.get(subject)])))
        shown = [f"image_{number}" for number in _MARK.findall(self._with_marks(case))]
        if lacking := [column for column in shown if column not in row.pictures]:
            raise ValueError(f"{row.place}: its text shows {lacking[0]}, which is empty")
        unplaced = [column for column in sorted(row.pictures) if column not in shown]
        first, *others = (row.pictures[column] for column in (*unplaced, *shown))
        return replace(case, picture=first, others=tuple(others), question=IMAGE * len(unplaced) + question)

    @staticmethod
    def _listed(text: Any, place: str, column: str) -> list[str]:
        """A list that is written as Python writes it."""
        try:
            found = ast.literal_eval(text) if isinstance(text, str) else text
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{place}: {column} is no list of texts: {text[:80]!r}") from error
        if not isinstance(found, list) or not found:
            raise ValueError(f"{place}: {column} is no list of texts: {str(text)[:80]!r}")
        return [str(one) for one in found]

    def _open(self, text: str) -> list[str]:
        """The true answers of an open question: one text, or a list as Python writes it."""
        return self._listed(text, "", "answer") if re.fullmatch(r"\[\s*(['\"]).*\1\s*\]", text, re.DOTALL) else [text]

    def _with_marks(self, case: Case) -> str:
        if isinstance(case.truth, list):
            return fill(self.open_prompt, {"question": case.question})
        return super()._prompt_for(case)

    def _prompt_for(self, case: Case) -> str:
        return _MARK.sub(IMAGE, self._with_marks(case))

    def letter(self, case: Case, answer: str) -> str:
        return chosen_letter(answer, case.truth.options)

    def judge(self, case: Case, answer: str) -> float:
        if isinstance(case.truth, list):
            return float(is_open_answer_right(answer, case.truth))
        return super().judge(case, answer)

    def grades(self, cases: Sequence[Case], answers: Sequence[str]) -> list[float]:
        return list(self._graded(cases, answers))

    def _graded(self, cases: Sequence[Case], answers: Sequence[str]) -> Iterator[float]:
        drawn = draws()
        for case, answer in zip(cases, answers, strict=True):
            if not isinstance(case.truth, list) and not self.letter(case, answer):
                yield float(drawn.choice(list(case.truth.options)) == case.truth.right)
            else:
                yield self.judge(case, answer)

    def shares_read(self, cases: Sequence[Case], answers: Sequence[str]) -> Metrics:
        pairs = [pair for pair in zip(cases, answers, strict=True) if not isinstance(pair[0].truth, list)]
        return super().shares_read(*zip(*pairs, strict=True)) if pairs else {}

    def drawn(self, case: Case) -> float:
        return 0.0 if isinstance(case.truth, list) else super().drawn(case)

    def constants(self, cases: Sequence[Case]) -> Sequence[str]:
        chosen = super().constants([case for case in cases if not isinstance(case.truth, list)])
        said = Counter(text for case in cases if isinstance(case.truth, list) for text in case.truth)
        return [*chosen, *(text for text, _ in said.most_common(COMMON))]

    def truth_text(self, case: Case) -> str:
        return " / ".join(case.truth) if isinstance(case.truth, list) else super().truth_text(case)
