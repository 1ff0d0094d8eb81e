"""OCRBench: 1,000 questions about text in pictures (Liu et al., 2024, arXiv:2305.07895)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_internvl.evaluation.answer_task import AnswerTask, Case
from lightning_internvl.evaluation.benchmark_files import field, picture_in, read_list
from lightning_internvl.evaluation.multiple_choice import needs_path
from lightning_internvl.inference.predictor import Metrics, Predictor

FORMULAS = "HME100k"  # the set whose answers are compared with their case and without blanks


class OCRBench(AnswerTask):
    """The number of right answers (`score`, of 1,000) and their share, over all and by type. An
    answer is right if a true one is anywhere in it, as in the official script.

    Args:
        path: OCRBench.json; `images` is the folder OCRBench_Images.
    """

    PROMPT = "{question}"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        needs_path(self.path, "OCRBench")

    def cases(self, predictor: Predictor) -> list[Case]:
        assert self.path is not None  # as the constructor has seen
        cases = []
        for number, record in enumerate(read_list(self.path)):
            place = f"{self.path}: question {number}"
            picture = picture_in(self.images, field(record, ("image_path",), place))
            said, question = record.get("answers"), field(record, ("question",), place)
            truth = None if said is None else (str(field(record, ("dataset_name",), place)), _texts(said))
            # "id" counts within one of the sets that it was put together from
            cases.append(Case(str(number), picture, question, truth, str(field(record, ("type",), place))))
        return cases

    def judge(self, case: Case, answer: str) -> float:
        source, truths = case.truth
        return float(any(contains(answer, truth, exact=source == FORMULAS) for truth in truths))

    def true_answers(self, case: Case) -> Sequence[str]:
        return case.truth[1]

    def truth_text(self, case: Case) -> str:
        return " / ".join(case.truth[1])

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        found = super().score(cases, answers, predictor)
        counts = {name: found[f"accuracy{end}"] * len(cases) for name, end in (("score", ""), ("score_chance", "_chance"))}
        return {**{name: round(value) for name, value in counts.items()}, **found}


def contains(answer: str, truth: str, exact: bool) -> bool:
    """Whether a true answer is in an answer (Yuliang-Liu/MultimodalOCR, OCRBench/example.py).

    Args:
        exact: whether case counts, and blanks do not; else the other way round.
    """
    answer, truth = (text.strip().replace("\n", " ") for text in (answer, truth))
    if exact:
        return truth.replace(" ", "") in answer.replace(" ", "")
    return truth.lower() in answer.lower()


def _texts(said: Any) -> list[str]:
    return [str(one) for one in said] if isinstance(said, list) else [str(said)]
