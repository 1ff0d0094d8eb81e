"""POPE: whether a model sees things that are not there (Li et al., 2023, arXiv:2305.10355)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.evaluation.answer_task import BUILT_IN, AnswerTask, Case
from lightning_internvl.evaluation.benchmark_files import field, picture_in, read_lines
from lightning_internvl.evaluation.scene_cases import pope_cases
from lightning_internvl.inference.predictor import Metrics, Predictor

NO = {"No", "not", "no"}


class POPE(AnswerTask):
    """Accuracy, precision, recall, F1 and the share of "yes", over all and by part.

    Args:
        path: a file of JSON lines ("image", "text", "label"), or a folder of such files, each a
            part.
    """

    PROMPT = "{question}\nAnswer the question using a single word or phrase."

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.files = _files(self.path) if self.path else []

    def cases(self, predictor: Predictor) -> list[Case]:
        if self.path is None:
            return pope_cases(predictor.held_out, BUILT_IN)
        return [case for file in self.files for case in self._read(file)]

    def _read(self, file: Path) -> list[Case]:
        part, cases, numbers = file.stem.rpartition("_")[2], [], set()
        name = file.stem if sum(other.stem == file.stem for other in self.files) == 1 else file.name
        for place, record in read_lines(file):
            label = str(field(record, ("label",), place)).lower()
            if label not in ("yes", "no"):
                raise ValueError(f"{place}: label {record['label']!r} is neither yes nor no")
            picture = picture_in(self.images, field(record, ("image",), place))
            line = place.rpartition(":")[2]
            number = str(record.get("question_id", line))
            if number in numbers:  # several files of the set in one, which all count from 1
                number = f"{number}, line {line}"
            numbers.add(number)
            cases.append(Case(f"{name}/{number}", picture, field(record, ("text", "question"), place), label, part))
        return cases

    def judge(self, case: Case, answer: str) -> float:
        return float(says_no(answer) == (case.truth == "no"))

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        rows = [(case.part, case.truth == "yes", not says_no(answer)) for case, answer in zip(cases, answers, strict=True)]
        parts = dict.fromkeys(part for part, _, _ in rows)
        found = _counted("", [row[1:] for row in rows])
        for part in parts if len(parts) > 1 else ():
            found |= _counted(f"_{part}", [row[1:] for row in rows if row[0] == part])
        return found


def says_no(answer: str) -> bool:
    """Whether an answer means no to the official script, which takes everything else for yes: one
    of `NO` is a word of the first sentence, commas aside."""
    return not NO.isdisjoint(answer.partition(".")[0].replace(",", "").split(" "))


def _counted(end: str, pairs: Sequence[tuple[bool, bool]]) -> Metrics:
    """The numbers of pairs (true answer is yes, model says yes)."""
    hits = sum(truth and said for truth, said in pairs)
    true, said = sum(truth for truth, _ in pairs), sum(said for _, said in pairs)
    right = sum(truth == said for truth, said in pairs)
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    common, share = max(true, len(pairs) - true) / len(pairs), true / len(pairs)
    return {
        f"accuracy{end}": right / len(pairs),
        f"accuracy{end}_chance": common,
        # of a model that always says yes
        f"precision{end}": precision,
        f"precision{end}_chance": share,
        f"recall{end}": recall,
        f"recall{end}_chance": float(true > 0),
        f"f1{end}": 2 * precision * recall / (precision + recall) if hits else 0.0,
        f"f1{end}_chance": 2 * share / (1 + share),
        f"yes_share{end}": said / len(pairs),
    }


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
    if not files:
        raise ValueError(f"path={path} holds no .json or .jsonl files")
    return files
