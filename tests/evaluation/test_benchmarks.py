"""The benchmarks in their published files: what is asked, what is shown, what right answers get, and files of other sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_toys as toys
import pytest

from lightning_internvl.evaluation.ai2d import AI2D
from lightning_internvl.evaluation.answer_task import AnswerTask, Case
from lightning_internvl.evaluation.chartqa import ChartQA
from lightning_internvl.evaluation.docvqa import DocVQA
from lightning_internvl.evaluation.mathvista import MathVista
from lightning_internvl.evaluation.mmbench import MMBench
from lightning_internvl.evaluation.mmmu import MMMU
from lightning_internvl.evaluation.mmstar import MMStar
from lightning_internvl.evaluation.ocrbench import OCRBench
from lightning_internvl.evaluation.video_mme import VideoMME
from lightning_internvl.evaluation.vqa import VQA
from lightning_internvl.inference.journal import Journal

TASKS: dict[str, Callable[..., AnswerTask]] = {
    "mmmu": MMMU, "mmbench": MMBench, "mmstar": MMStar, "ai2d": AI2D, "docvqa": DocVQA, "chartqa": ChartQA,
    "ocrbench": OCRBench, "textvqa": VQA, "mathvista": MathVista, "video_mme": VideoMME,
}  # fmt: skip
MEASURES = {"docvqa": "anls", "chartqa": "relaxed_accuracy"}


def right(task: AnswerTask, case: Case) -> str:
    """A true answer."""
    choice = getattr(case.truth, "right", None)
    return choice if choice else task.true_answers(case)[0]


def answered(task: AnswerTask, predictor: toys.Talker) -> dict[str, float]:
    """The numbers of a model that is right; what is asked about what is noted."""
    said = iter([right(task, case) for case in task.cases(predictor)])
    predictor.rule = lambda *_: next(said)
    return task(predictor)


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_to_a_published_file(name: str, tmp_path: Path) -> None:
    path, predictor = toys.FILES[name](tmp_path), toys.Talker(lambda *_: "", Journal(tmp_path / "out.jsonl", 2), video=True)
    task = TASKS[name](path=str(path))
    found = answered(task, predictor)
    measure = MEASURES.get(name, "accuracy")
    assert found[measure] == pytest.approx(1.0)
    assert found[f"{measure}_chance"] < 0.8
    assert found["samples"] == found["samples_asked"] == len({case.key for case in task.cases(predictor)}) >= 24
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all("picture" in row for row in rows)
    assert not predictor.journal.missing
    again = toys.Talker(lambda *_: "", Journal(tmp_path / "out.jsonl"), video=True)
    assert TASKS[name](path=str(path))(again) == found  # every answer was kept, with the digests of its pictures
    assert not again.asked


def test_the_prompts_are_the_published_ones(tmp_path: Path) -> None:
    first = {}
    for name in TASKS:
        predictor = toys.Talker(lambda *_: "A", video=True)
        (tmp_path / name).mkdir()
        TASKS[name](path=str(toys.FILES[name](tmp_path / name)), samples=3)(predictor)
        first[name] = predictor.asked[0]
    letter = "Answer with the option's letter from the given choices directly."
    word = "Answer the question using a single word or phrase."
    video = "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter"
    hint = "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end."
    assert first == {
        "mmmu": f"What of Art 1 is in <image>?\n(A) a dog\n(B) <image>\n(C) 7 cm\n\n{letter}",
        "mmbench": f"a hint\nwhat\nis 1?\nA. a dog\nB. two dogs\nC. 7 cm\n{letter}",
        "mmstar": f"what is 0?\nOptions: A: red, B: a dog, C: two dogs, D: 7 cm\n{letter}",
        "ai2d": f"which is 0?\nA. red\nB. a dog\nC. two dogs\nD. 7 cm\n{letter}",
        "docvqa": f"what is 0?\n{word}",
        "chartqa": f"augmented 0?\n{word}",
        "ocrbench": "0?",
        "textvqa": f"what 0?\n{word}",
        "mathvista": f"{hint}\nQuestion: what is 1? (Unit: g)",
        "video_mme": f"<video>\n{video} (A, B, C, or D) of the correct option.\nwhat is 0?\nA. red\nB. a dog\nC. two dogs\n"
        "D. 7 cm\nThe best answer is:",
    }  # fmt: skip


def test_pictures_stand_where_the_text_shows_them(tmp_path: Path) -> None:
    shown = []
    predictor = toys.Talker(lambda pictures, question: shown.append((question, [int(one[0, 0, 0]) for one in pictures])) or "A")
    MMMU(path=str(toys.mmmu(tmp_path)))(predictor)
    assert [values for _, values in shown[:4]] == [[1, 101], [2], [3, 103], [4]]
    assert all(question.count("<image>") == len(values) for question, values in shown)
    assert shown[3][0] == "What of Art 4 is in <image>?\nAnswer the question using a single word or phrase."


def test_a_picture_without_a_mark_comes_first_and_a_mark_without_a_picture_is_told(tmp_path: Path) -> None:
    row = {"id": "validation_Art_1", "question": "see <image 2>", "options": "['x', 'y']", "answer": "A"}
    row |= {"question_type": "multiple-choice", "image_1": toys.stored(1), "image_2": toys.stored(2)}
    values = []
    predictor = toys.Talker(lambda pictures, _: values.append([int(one[0, 0, 0]) for one in pictures]) or "A")
    MMMU(path=str(toys.parquet(tmp_path / "a.parquet", [row])))(predictor)
    assert (values, predictor.asked[0][:21]) == ([[1, 2]], "<image>see <image>\n(A")
    path = toys.parquet(tmp_path / "b.parquet", [row | {"question": "see <image 3>"}])
    with pytest.raises(ValueError, match=r"b.parquet, row 1: its text shows image_3, which is empty"):
        MMMU(path=str(path))(predictor)


def test_a_question_counts_in_all_orders_of_its_options_or_not_at_all(tmp_path: Path) -> None:
    for copies in (True, False):  # the file's own, and those that are made
        task = MMBench(path=str(toys.mmbench(tmp_path, copies=copies)))
        cases = task.cases(toys.Talker(lambda *_: ""))
        assert len(cases) == sum(2 + number % 3 for number in range(1, 13))
        wrong = {"1000003"}
        said = iter(["Z" if case.key in wrong else right(task, case) for case in cases])
        found = task(toys.Talker(lambda *_, said=said: next(said)))
        assert (found["accuracy"], found["accuracy_plain"], found["questions"]) == (pytest.approx(11 / 12), 1.0, 12)
        assert found["accuracy_ability 1"] == pytest.approx(5 / 6)
        assert found["accuracy_chance"] < found["accuracy_plain_chance"] < 0.6
    plain = MMBench(path=str(toys.mmbench(tmp_path)), circular=False)
    assert len(plain.cases(toys.Talker(lambda *_: ""))) == 12


def test_a_question_whose_orders_were_not_all_asked_is_left_out(tmp_path: Path) -> None:
    task = MMBench(path=str(toys.mmbench(tmp_path)), samples=4)  # three orders of the first question, one of the second
    predictor = toys.Talker(lambda *_: "A")
    assert task(predictor)["samples"] == 3
    assert predictor.journal.missing == {"2": "one of the orders of its options"}


def test_an_answer_of_mmmu_that_chooses_nothing_gets_a_drawn_option(tmp_path: Path) -> None:
    task = MMMU(path=str(toys.mmmu(tmp_path)))
    cases = task.cases(toys.Talker(lambda *_: ""))
    empty, words = (task.grades(cases, [text] * len(cases)) for text in ("", "hm"))
    assert empty == words
    assert 0 < sum(empty) < len(cases)
    assert task.score(cases, [""] * len(cases), toys.Talker(lambda *_: ""))["answers_with_option"] == 0


def test_videos_are_frames_and_need_a_model_that_reads_them(tmp_path: Path) -> None:
    path, seen = toys.video_mme(tmp_path), []
    predictor = toys.Talker(lambda videos, _: seen.append(videos[0]) or "C because", video=True)
    found = VideoMME(path=str(path), frames=2)(predictor)
    assert [video.shape for video in seen] == [(2, 9, 9, 3)] * 24
    assert [int(frame[0, 0, 0]) for frame in seen[3]] == [11, 13]
    assert {"accuracy_short", "accuracy_domain 1", "accuracy_OCR Problems", "accuracy_of_answered"} <= found.keys()
    with pytest.raises(ValueError, match="Video-MME asks about videos, and this model reads pictures only"):
        VideoMME(path=str(path))(toys.Talker(lambda *_: "A"))
    (tmp_path / "data" / "v1").rename(tmp_path / "data" / "other")
    with pytest.raises(ValueError, match=r"3 of 24 samples .* 001-0: video .*v1.mp4 does not exist"):
        VideoMME(path=str(path))(predictor)


def test_numbers_are_near_the_truth_or_near_the_answer(tmp_path: Path) -> None:
    path = toys.saved(tmp_path / "test_human.json", [{"imgname": "0.png", "query": "?", "label": "100"}])
    toys.pictures(tmp_path / "png", 1)
    scores = [
        ChartQA(path=str(path), relative_to=of)(toys.Talker(lambda *_: "105.2"))["relaxed_accuracy"] for of in ("truth", "answer")
    ]
    assert scores == [0.0, 1.0]


def test_what_is_missing_is_counted(tmp_path: Path) -> None:
    path = toys.docvqa(tmp_path)
    (tmp_path / "documents" / "3.png").unlink()
    rows = toys.tsv(
        tmp_path / "bad.tsv", [{"index": 1, "question": "?", "A": "x", "B": "y", "answer": "A", "image": "no base64! " * 9}]
    )
    predictor = toys.Talker(lambda *_: "red")
    with pytest.raises(ValueError, match=r"bad.tsv, row 1, image: its text is no base64"):
        AI2D(path=str(rows))(predictor)
    predictor.journal.missing.clear()
    assert DocVQA(path=str(path), max_missing=0.1)(predictor)["samples"] == 23
    assert "documents/3.png does not exist" in predictor.journal.missing["3"]


OTHER = [
    ("mmmu", "mmstar", r"row 1 has no 'id'; it has 'index', 'question'"),
    ("mmstar", "ai2d", r"row 1 has no 'index'; it has"),
    ("ai2d", "video_mme", r"row 1: the answer 'A' is no number of its 4 options"),
    ("mmbench", "ai2d", r"row 1 has no 'index'"),
    ("docvqa", "ocrbench", r"OCRBench.json holds no list of 'data'; it holds a list"),
    ("chartqa", "docvqa", r"holds no test_human.json|is no list of records; it holds dataset_name, data"),
    ("ocrbench", "mathvista", r"testmini.json is no list of records; it holds 1, 2, 3"),
    ("textvqa", "docvqa", r"go together; give both or none, or TextVQA's own file alone"),
    ("mathvista", "docvqa", r"val_v1.0.json holds no problems by their pid"),
    ("video_mme", "mmstar", r"row 1 has no 'question_id'; it has"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "file", "message"), OTHER, ids=[task for task, _, _ in OTHER])
def test_the_file_of_another_set_is_told_by_its_field(task: str, file: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[task](path=str(toys.FILES[file](tmp_path))).cases(toys.Talker(lambda *_: "", video=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, "path=null: MMBench asks the questions of its own files"),
        ({"prompt": "{question}"}, "has no place for the options; write {options} there"),
        ({"option": "{letter}"}, r"option='{letter}' has no place for {letter} or {text}"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MMBench(**({"path": str(toys.mmbench(tmp_path))} | options))


def test_lists_in_a_column_are_read_and_never_run(tmp_path: Path) -> None:
    row = {
        "id": "validation_Art_1",
        "question": "<image 1>",
        "answer": "A",
        "image_1": toys.stored(1),
        "question_type": "multiple-choice",
    }
    path = toys.parquet(tmp_path / "a.parquet", [row | {"options": "__import__('os').getcwd()"}])
    with pytest.raises(ValueError, match=r"row 1: options is no list of texts: \"__import__"):
        MMMU(path=str(path)).cases(toys.Talker(lambda *_: ""))


def test_a_table_names_the_row_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("index\tquestion\timage\n1\twhat?\n")
    with pytest.raises(ValueError, match=r"x.tsv, row 1 has 2 fields, not the 3 of the first line"):
        AI2D(path=str(tmp_path / "x.tsv")).cases(toys.Talker(lambda *_: ""))
    (tmp_path / "x.tsv").write_text("index\tquestion\timage\n1\twhat?\t7\n")
    with pytest.raises(ValueError, match=r"row 1: its picture is that of row '7', and no earlier row with this index has one"):
        AI2D(path=str(tmp_path / "x.tsv")).cases(toys.Talker(lambda *_: ""))


def test_a_prompt_of_the_users_own(tmp_path: Path) -> None:
    predictor = toys.Talker(lambda *_: "A")
    AI2D(path=str(toys.ai2d(tmp_path)), prompt="Q {question} {options}", option="{letter}) {text}", samples=1)(predictor)
    assert predictor.asked == ["Q which is 0? A) red\nB) a dog\nC) two dogs\nD) 7 cm"]
