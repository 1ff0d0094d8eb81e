"""Questions that ten people have answered (VQAv2, OK-VQA, VizWiz, TextVQA)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.evaluation.answer_task import BUILT_IN, AnswerTask, Case, beside_chance, existing_path
from lightning_internvl.evaluation.benchmark_files import field, picture_in, pictures_by_number, read_object, says
from lightning_internvl.evaluation.metrics.vqa_accuracy import FORMS, accuracy, best_single_answer
from lightning_internvl.evaluation.scene_cases import question_cases
from lightning_internvl.inference.predictor import Metrics, Predictor
from lightning_internvl.messages import did_you_mean

PEOPLE = 10  # who all say the same about a scene


class VQA(AnswerTask):
    """VQA accuracy: the soft score over what ten people answered, after the official normalisation.

    Args:
        path: the JSON of questions; each names its picture by "image_id" or "image". Or TextVQA's
            own file, which holds the answers, too.
        annotations: the JSON of answers to them; None with TextVQA's file.
        form: whose common form of answers, "vqa" or "textvqa"; None: that of the file.
    """

    PROMPT = "{question}\nAnswer the question using a single word or phrase."

    def __init__(self, *, annotations: str | None = None, form: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        if form is not None and form not in FORMS:
            raise ValueError(f"{form=} is not known; {did_you_mean(form, FORMS)}, null")
        path = options.get("path")
        self.annotations = existing_path(annotations, "annotations")
        textvqa = self.path is not None and self.annotations is None and says(self.path, "dataset_name", "textvqa")
        self.form = form or ("textvqa" if textvqa else "vqa")
        if (self.path is None) != (self.annotations is None) and not textvqa:
            both = f"path={path} (questions) and annotations={annotations} (answers)"
            raise ValueError(f"{both} go together; give both or none, or TextVQA's own file alone")

    def cases(self, predictor: Predictor) -> list[Case]:
        if self.path is None:
            return [_agreed(case) for case in question_cases(predictor.held_out, self.samples or BUILT_IN)]
        if self.annotations is None:
            return list(self._textvqa(self.path))
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

    def _textvqa(self, path: Path) -> Iterator[Case]:
        """The questions of TextVQA_0.5.1_val.json; a picture is a file named by its image_id."""
        places: dict[Any, str] = {}
        for place, record in enumerate(read_object(path, "data")):
            where = f"{path}: question {place}"
            key, picture = field(record, ("question_id",), where), field(record, ("image_id",), where)
            self._only(key, where, places)
            people = record.get("answers") or None
            yield Case(str(key), picture_in(self.images, f"{picture}.jpg"), field(record, ("question",), where), people)

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
        return accuracy(answer, case.truth, self.form)

    def truth_text(self, case: Case) -> str:
        return ", ".join(f"{answer} ({count})" for answer, count in Counter(case.truth).most_common())

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        return beside_chance(self.MEASURE, cases, self.grades(cases, answers), [self._of_kinds(cases)])

    def _of_kinds(self, cases: Sequence[Case]) -> list[float]:
        """What each question gets from the answer that gets most from the questions of its part."""
        said: dict[str, list[Sequence[str]]] = {}
        for case in cases:
            said.setdefault(case.part, []).append(case.truth)
        best = {part: best_single_answer(people, self.form) for part, people in said.items()}
        return [self.judge(case, best[case.part]) for case in cases]


def _agreed(case: Case) -> Case:
    return Case(case.key, case.picture, case.question, [case.truth] * PEOPLE, case.part)
