"""What models get that see nothing, on every task judged on answers.

`python tests/evaluation/blind_models.py` prints the table of docs/evaluation.md.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import benchmark_toys as toys

from lightning_internvl.evaluation.ai2d import AI2D
from lightning_internvl.evaluation.answer_task import AnswerTask, Case
from lightning_internvl.evaluation.captions import Captions
from lightning_internvl.evaluation.chartqa import ChartQA
from lightning_internvl.evaluation.docvqa import DocVQA
from lightning_internvl.evaluation.mathvista import MathVista
from lightning_internvl.evaluation.mmbench import MMBench
from lightning_internvl.evaluation.mme import MME
from lightning_internvl.evaluation.mmmu import MMMU
from lightning_internvl.evaluation.mmstar import MMStar
from lightning_internvl.evaluation.ocrbench import OCRBench
from lightning_internvl.evaluation.pope import POPE
from lightning_internvl.evaluation.refer import Referring
from lightning_internvl.evaluation.video_mme import VideoMME
from lightning_internvl.evaluation.vqa import VQA

SCENES: dict[str, Callable[..., AnswerTask]] = {"captions": Captions, "vqa": VQA, "pope": POPE, "mme": MME, "refer": Referring}
FILES: dict[str, Callable[..., AnswerTask]] = {
    "mmmu": MMMU, "mmbench": MMBench, "mmstar": MMStar, "ai2d": AI2D, "docvqa": DocVQA, "chartqa": ChartQA,
    "ocrbench": OCRBench, "textvqa": VQA, "mathvista": MathVista, "video_mme": VideoMME,
}  # fmt: skip
MEASURES = {
    "captions": "caption_cider", "mme": "perception", "refer": "accuracy_at_0.5", "docvqa": "anls", "chartqa": "relaxed_accuracy",
}  # fmt: skip
CONSTANTS = (
    "", ".", "Yes.", "No", "A", "B", "(C)", "The answer is D.", "I don't know", "a", "the", "1", "50%", "red", "none of these",
    "a photo of a cat", "[1, 2]", "there is a dog on a red background",
    "I am sorry, but I cannot see any picture and so I can not answer this question",
    "<box>(0,0),(1000,1000)</box>", "<box>(250,250),(750,750)</box>",
)  # fmt: skip


class Scores(NamedTuple):
    """Of one task: numbers by name for answers that are right, of each constant, and at random."""

    perfect: dict[str, float]
    constant: dict[str, dict[str, float]]
    drawn: dict[str, float]


def task_of(name: str, folder: Path, questions: int) -> AnswerTask:
    """A task judged on answers: on scenes, or on a toy file in the form of the published one."""
    if name in SCENES:
        return SCENES[name](samples=questions, **({"meteor": False} if name == "captions" else {}))
    own = folder / name
    own.mkdir()
    return FILES[name](path=str(toys.FILES[name](own, questions // 3 if name == "mmbench" else questions)))


def scores_of(task: AnswerTask) -> Scores:
    """No picture is looked at."""
    predictor = toys.Talker(lambda *_: "", video=True)
    cases, rng = task.cases(predictor)[: task.samples], random.Random(0)
    true = [true_answer(task, case) for case in cases]

    def score(answers: list[str]) -> dict[str, float]:
        return task.score(cases, answers, predictor)

    constants = dict.fromkeys((*CONSTANTS, *dict.fromkeys(true[:8])))
    drawn = [random_answer(case, true, rng) for case in cases]
    return Scores(score(true), {text: score([text] * len(cases)) for text in constants}, score(drawn))


def true_answer(task: AnswerTask, case: Case) -> str:
    if hasattr(case.truth, "right"):
        return case.truth.right
    if isinstance(task, Captions | VQA | MMMU):
        return case.truth[0]
    return task.truth_text(case).split(" / ")[0] if not isinstance(task, MathVista) else case.truth.answer


def random_answer(case: Case, true: list[str], rng: random.Random) -> str:
    """A letter of the options where there are some, else what is true of any question."""
    if hasattr(case.truth, "right"):
        return rng.choice(list(case.truth.options))
    choices = getattr(case.truth, "choices", ())
    return rng.choice("ABCDEFGH"[: len(choices)]) if choices else rng.choice(true)


def main() -> None:
    print("| task | measure | perfect | best constant | random | expected chance |\n| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for name in (*SCENES, *FILES):
            found, measure = scores_of(task_of(name, Path(folder), 240)), MEASURES.get(name, "accuracy")
            constant = max(one[measure] for one in found.constant.values())
            values = found.perfect[measure], constant, found.drawn[measure], found.perfect[f"{measure}_chance"]
            print(f"| `{name}` | {measure} | " + " | ".join(f"{value:.3g}" for value in values) + " |", flush=True)


if __name__ == "__main__":
    main()
