"""DocVQA and InfographicVQA: questions about documents (Mathew et al., 2021, arXiv:2007.00398 and
arXiv:2104.12756)."""

from __future__ import annotations

from typing import Any

from lightning_internvl.evaluation.answer_task import AnswerTask, Case
from lightning_internvl.evaluation.benchmark_files import field, picture_in, read_object
from lightning_internvl.evaluation.metrics.edit_distance import anls
from lightning_internvl.evaluation.multiple_choice import needs_path
from lightning_internvl.inference.predictor import Predictor


class DocVQA(AnswerTask):
    """ANLS, over all and by kind of question where the file says it.

    Args:
        path: val_v1.0.json or val_v1.0_withQT.json of DocVQA, or the file of InfographicVQA.
    """

    PROMPT = "{question}\nAnswer the question using a single word or phrase."
    MEASURE = "anls"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        needs_path(self.path, "DocVQA")

    def cases(self, predictor: Predictor) -> list[Case]:
        assert self.path is not None  # as the constructor has seen
        cases = []
        for number, record in enumerate(read_object(self.path, "data")):
            place = f"{self.path}: question {number}"
            picture = picture_in(self.images, field(record, ("image", "image_local_name"), place))
            key, question = field(record, ("questionId",), place), field(record, ("question",), place)
            kinds = [str(kind) for kind in record.get("question_types") or record.get("answer_type") or ()]
            cases.append(Case(str(key), picture, question, record.get("answers") or None, groups=tuple(kinds)))
        return cases

    def judge(self, case: Case, answer: str) -> float:
        return anls(answer, case.truth)

    def truth_text(self, case: Case) -> str:
        return " / ".join(case.truth)
