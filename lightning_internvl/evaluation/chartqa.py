"""ChartQA: questions about charts, of people and made by a model (Masry et al., 2022,
arXiv:2203.10244)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_internvl.evaluation.answer_task import AnswerTask, Case
from lightning_internvl.evaluation.benchmark_files import field, picture_in, read_list
from lightning_internvl.evaluation.metrics.relaxed_accuracy import is_nearly
from lightning_internvl.evaluation.multiple_choice import needs_path
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.messages import did_you_mean

RELATIVE = ("truth", "answer")


class ChartQA(AnswerTask):
    """Relaxed accuracy, over all and by part. Both parts of the test are equally long, so that the
    whole is their mean.

    Args:
        path: test_human.json or test_augmented.json, or the folder of both; pictures are in its
            folder "png" unless `images` says otherwise.
        relative_to: of what a number may be 5% away: the true one, or the answer.
    """

    PROMPT = "{question}\nAnswer the question using a single word or phrase."
    MEASURE = "relaxed_accuracy"

    def __init__(self, *, relative_to: str = "truth", images: str | None = None, **options: Any) -> None:
        super().__init__(images=images, **options)
        needs_path(self.path, "ChartQA")
        if relative_to not in RELATIVE:
            raise ValueError(f"{relative_to=} is not known; {did_you_mean(relative_to, RELATIVE)}")
        self.relative_to = relative_to
        if images is None and (self.images / "png").is_dir():
            self.images /= "png"
        self.files = _files(self.path) if self.path else []

    def cases(self, predictor: Predictor) -> list[Case]:
        return [case for file in self.files for case in self._read(file)]

    def _read(self, file: Path) -> list[Case]:
        part, cases = file.stem.rpartition("_")[2], []
        for number, record in enumerate(read_list(file)):
            place = f"{file}: question {number}"
            picture = picture_in(self.images, field(record, ("imgname",), place))
            truth = record.get("label")
            truth = None if truth is None else str(truth)
            cases.append(Case(f"{file.stem}/{number}", picture, field(record, ("query",), place), truth, part))
        return cases

    def judge(self, case: Case, answer: str) -> float:
        said = answer.strip()
        pair = (said, case.truth) if self.relative_to == "truth" else (case.truth, said)
        return float(is_nearly(*pair))


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("test_*.json"))
    if not files:
        raise ValueError(f"path={path} holds no test_human.json or test_augmented.json")
    return files
