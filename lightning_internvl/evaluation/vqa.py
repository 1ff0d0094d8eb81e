"""Questions that ten people have answered (VQAv2, OK-VQA, VizWiz, TextVQA in the files of VQA)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.evaluation.answer_task import BUILT_IN, AnswerTask, Case, existing_path, means_by_part
from lightning_internvl.evaluation.benchmark_files import field, picture_in, pictures_by_number, read_object
from lightning_internvl.evaluation.metrics.vqa_accuracy import accuracy
from lightning_internvl.evaluation.scene_cases import question_cases
from lightning_internvl.inference.predictor import Metrics, Predictor

PEOPLE = 10  # who all say the same about a scene


class VQA(AnswerTask):
    """VQA accuracy: the soft score over what ten people answered, after the official normalisation.

    Args:
        path: the JSON of questions; each names its picture by "image_id" or "image".
        annotations: the JSON of answers to them.
    """

    PROMPT = "{question}\nAnswer the question using a single word or phrase."

    def __init__(self, *, annotations: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        path = options.get("path")
        self.annotations = existing_path(annotations, "annotations")
        if (self.path is None) != (self.annotations is None):
            both = f"path={path} (questions) and annotations={annotations} (answers)"
            raise ValueError(f"{both} go together; give both or none")

    def cases(self, predictor: Predictor) -> list[Case]:
        if self.path is None or self.annotations is None:
            return [_agreed(case) for case in question_cases(predictor.held_out, self.samples or BUILT_IN)]
        people = self._by_question(read_object(self.annotations, "annotations"))
        numbered: dict[int, Path] | None = None
        cases: list[Case] = []
        places: dict[Any, str] = {}
        for place, record in enumerate(read_object(self.path, "questions")):
            where = f"{self.path}: question {place}"
            key = field(record, ("question_id",), where)
            self._only(key, where, places)
            if "image" in record:
                picture = picture_in(self.images, record["image"])
            else:
                numbered = pictures_by_number(self.images) if numbered is None else numbered
                number = int(field(record, ("image_id",), where))
                picture = numbered.get(number, self.images / f"*{number:012d}.*")
            known = people.get(key, {})
            answers = [answer["answer"] for answer in known.get("answers", ())] or None
            cases.append(Case(str(key), picture, field(record, ("question",), where), answers, known.get("answer_type", "")))
        return cases

    def _by_question(self, records: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
        people: dict[Any, dict[str, Any]] = {}
        places: dict[Any, str] = {}
        for place, record in enumerate(records):
            where = f"{self.annotations}: annotation {place}"
            key = field(record, ("question_id",), where)
            self._only(key, where, places)
            people[key] = record
        return people

    @staticmethod
    def _only(key: Any, where: str, places: dict[Any, str]) -> None:
        """Note where a question_id stands; raises ValueError for one that stands elsewhere too:
        nothing else tells which answers belong to which question."""
        if (first := places.setdefault(key, where)) != where:
            two = f"{first} and {where.rpartition(': ')[2]}"
            raise ValueError(f"{two} have the same question_id {key!r}; give each its own")

    def judge(self, case: Case, answer: str) -> float:
        return accuracy(answer, case.truth)

    def truth_text(self, case: Case) -> str:
        return ", ".join(f"{answer} ({count})" for answer, count in Counter(case.truth).most_common())

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        said = zip(cases, answers, strict=True)
        found = means_by_part("accuracy", cases, [self.judge(case, answer) for case, answer in said])
        chance = means_by_part("accuracy", cases, self._commonest(cases))
        return {key: value for name in found for key, value in ((name, found[name]), (f"{name}_chance", chance[name]))}

    def _commonest(self, cases: Sequence[Case]) -> list[float]:
        """What each question gets from the answer that is the commonest of its part."""
        said: dict[str, Counter[str]] = {}
        for case in cases:
            said.setdefault(case.part, Counter()).update(case.truth)
        best = {part: counts.most_common(1)[0][0] for part, counts in said.items()}
        return [self.judge(case, best[case.part]) for case in cases]


def _agreed(case: Case) -> Case:
    return Case(case.key, case.picture, case.question, [case.truth] * PEOPLE, case.part)
