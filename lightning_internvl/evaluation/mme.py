"""MME: two questions a picture, one to be answered yes and one no (Fu et al., 2023,
arXiv:2306.13394)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.data.files.images import is_image_file
from lightning_internvl.evaluation.answer_task import BUILT_IN, AnswerTask, Case
from lightning_internvl.evaluation.scene_cases import mme_cases
from lightning_internvl.inference.predictor import Metrics, Predictor

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
# Folders of some subtasks; the others have all files in one.
QUESTIONS, PICTURES = "questions_answers_YN", "images"
# of answers that are drawn; where a set has more of one answer, always giving that is better
CHANCE = {"accuracy": 0.5, "accuracy_plus": 0.25, "score": 75.0}


class MME(AnswerTask):
    """For each subtask the share of right answers, that of pictures with both right (accuracy+),
    and their sum in percent, the score; over all subtasks of perception and of cognition the sums
    of their scores.

    Args:
        path: the folder of the set, a folder a subtask; or one subtask.
    """

    PROMPT = "{question}"  # the questions of the set ask for yes or no

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.folders = _subtasks(self.path) if self.path else []

    def cases(self, predictor: Predictor) -> list[Case]:
        if self.path is None:
            return mme_cases(predictor.held_out, BUILT_IN)
        return [case for folder in self.folders for case in _read(folder)]

    def judge(self, case: Case, answer: str) -> float:
        return float(meaning(answer) == case.truth)

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        sizes = Counter(_pair(case) for case in cases)
        for _, key in (pair for pair, size in sizes.items() if size != 2):
            predictor.journal.add_missing(key, "one of its two questions")
        whole = [(case, answer) for case, answer in zip(cases, answers, strict=True) if sizes[_pair(case)] == 2]
        asked = [case for case, _ in whole]
        found = self._of_parts(asked, [answer for _, answer in whole])
        blind = [self._of_parts(asked, [answer] * len(asked)) for answer in ("yes", "no")]
        chance = {
            part: {name: max(drawn, *(one[part][name] for one in blind)) for name, drawn in CHANCE.items()} for part in found
        }
        return {**_sums(found, chance), **_named(found, chance), "samples": len(asked)}

    def _of_parts(self, cases: Sequence[Case], answers: Sequence[str]) -> dict[str, Metrics]:
        """Accuracy, accuracy+ and score of each subtask, of pictures with two questions each."""
        right: dict[str, dict[str, list[bool]]] = {}
        for case, answer in zip(cases, answers, strict=True):
            part, picture = _pair(case)
            right.setdefault(part, {}).setdefault(picture, []).append(bool(self.judge(case, answer)))
        found = {}
        for part, pictures in right.items():
            accuracy = sum(map(sum, pictures.values())) / (2 * len(pictures))
            plus = sum(map(all, pictures.values())) / len(pictures)
            found[part] = {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * (accuracy + plus)}
        return found


def _pair(case: Case) -> tuple[str, str]:
    """The subtask and the picture of a question."""
    return case.part, case.key.rpartition("/")[0]


def _sums(found: dict[str, Metrics], chance: dict[str, Metrics]) -> Metrics:
    sums: Metrics = {}
    for name, parts in (("perception", PERCEPTION), ("cognition", COGNITION)):
        own = [part for part in parts if part in found]
        if own:
            sums |= {name: sum(found[part]["score"] for part in own), f"{name}_subtasks": len(own)}
            sums[f"{name}_chance"] = sum(chance[part]["score"] for part in own)
    return sums


def meaning(answer: str) -> str:
    """What an answer means to the official script: yes or no where that is in its first four
    letters, else "other"."""
    answer = answer.lower()
    start = answer if answer in ("yes", "no") else answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _named(found: dict[str, Metrics], chance: dict[str, Metrics]) -> Metrics:
    return {
        name: value
        for part, numbers in found.items()
        for key, number in numbers.items()
        for name, value in ((f"{part}_{key}", number), (f"{part}_{key}_chance", chance[part][key]))
    }


def _subtasks(path: Path) -> list[Path]:
    places = (path, *sorted(path.iterdir())) if path.is_dir() else ()
    folders = [folder for folder in places if folder.is_dir() and _texts(folder)]
    if not folders:
        fault = "neither it nor a folder in it holds NAME.txt files of questions"
        raise ValueError(f"path={path} is no MME folder: {fault}")
    return folders


def _texts(folder: Path) -> list[Path]:
    own = folder / QUESTIONS
    return sorted((own if own.is_dir() else folder).glob("*.txt"))


def _read(folder: Path) -> list[Case]:
    cases = []
    pictures = folder / PICTURES if (folder / PICTURES).is_dir() else folder
    by_stem = {path.stem: path for path in pictures.iterdir() if is_image_file(path)}
    for text in _texts(folder):
        picture = by_stem.get(text.stem, pictures / f"{text.stem}.jpg")
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines):
            question, _, truth = line.strip().rpartition("\t")
            if truth.lower() not in ("yes", "no") or not question:
                wanted = "question, a tab, and Yes or No"
                raise ValueError(f"{text}:{number + 1} is no {wanted}: {line[:80]!r}")
            cases.append(Case(f"{folder.name}/{text.stem}/{number}", picture, question.strip(), truth.lower(), folder.name))
    return cases
