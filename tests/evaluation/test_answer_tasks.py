"""Tasks judged on text: the files of public sets, what is missing, going on after a stop, and the built-in scenes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.evaluation.answer_task import AnswerTask, Case
from lightning_internvl.evaluation.captions import Captions
from lightning_internvl.evaluation.mme import MME
from lightning_internvl.evaluation.pope import POPE
from lightning_internvl.evaluation.refer import Referring
from lightning_internvl.evaluation.vqa import VQA
from lightning_internvl.inference.journal import Journal
from lightning_internvl.report.metrics_table import scored_of


class Talker:
    """A predictor whose model answers by a rule."""

    def __init__(self, rule: Callable[[np.ndarray, str], str], journal: Journal | None = None) -> None:
        self.rule, self.journal, self.asked = rule, journal or Journal(), []
        self.held_out, self.pairs = HeldOutScenes(seed=0, image_size=24), None
        self.chats, self.batch_size = SimpleNamespace(processor=SimpleNamespace(max_tiles=1)), 3

    def answer(self, pictures: Sequence[np.ndarray], questions: Sequence[str], tokens: int, **search: Any) -> list[str]:
        self.asked += questions
        return [self.rule(picture, question) for picture, question in zip(pictures, questions, strict=True)]


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), (value, value, value)).save(path)


def lines(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def vqa(tmp_path: Path) -> dict[str, str]:
    """Questions about pictures 1 to 4 in COCO's names, each answered 2 by everyone."""
    for number in range(1, 5):
        picture(tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)
    questions = [{"question_id": 10 * n, "image_id": n, "question": f"how many {n}?"} for n in range(1, 5)]
    answers = [
        {"question_id": 10 * n, "answer_type": "number", "answers": [{"answer": "2", "answer_id": i} for i in range(10)]}
        for n in range(1, 5)
    ]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    return {"path": str(tmp_path / "q.json"), "annotations": str(tmp_path / "a.json"), "images": str(tmp_path / "val2014")}


def test_vqa_files(vqa: dict[str, str]) -> None:
    predictor = Talker(lambda picture, question: "2" if picture[0, 0, 0] < 4 else "3")
    found = VQA(**vqa)(predictor)
    assert found == {"accuracy": 0.75, "accuracy_chance": 1.0, "samples": 4, "samples_asked": 4, "samples_total": 4}
    assert predictor.asked[0] == "how many 1?\nAnswer the question using a single word or phrase."
    assert VQA(**vqa, samples=2, prompt="Q: {question}")(predictor)["samples_total"] == 4
    assert predictor.asked[-1] == "Q: how many 2?"


def test_what_is_missing_is_counted_named_and_limited(vqa: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    (tmp_path / "val2014" / "COCO_val2014_000000000003.jpg").write_text("<html>")
    annotations = json.loads(Path(vqa["annotations"]).read_text())
    Path(vqa["annotations"]).write_text(json.dumps({"annotations": annotations["annotations"][:3]}))
    with pytest.raises(ValueError, match=r"2 of 4 samples cannot be scored, more than max_missing=0.01 .* 20: image .* exist"):
        VQA(**vqa)(predictor := Talker(lambda *_: "2"))
    assert not predictor.asked  # nothing was asked for a score that cannot be
    predictor = Talker(lambda *_: "2")
    found = VQA(**vqa, max_missing=0.75)(predictor)
    assert (found["accuracy"], found["samples"], found["samples_asked"], scored_of(found)) == (1.0, 1, 4, "1 of 4")
    assert set(predictor.journal.missing) == {"20", "30", "40"}
    assert "cannot be read" in predictor.journal.missing["30"]
    assert predictor.journal.missing["40"] == "there is no true answer"
    with pytest.raises(ValueError, match="3 of 4 samples"):
        VQA(**vqa, max_missing=0.5)(Talker(lambda *_: "2"))


def test_goes_on_where_it_was_stopped(vqa: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "out" / "predictions.jsonl"

    def stops(picture: np.ndarray, question: str) -> str:
        if "4" in question:
            raise KeyboardInterrupt
        return "2"

    with pytest.raises(KeyboardInterrupt):
        VQA(**vqa)(Talker(stops, Journal(path)))
    path.write_text(path.read_text() + '{"key": "40", "ques')  # half a line, as a kill leaves it
    predictor = Talker(lambda *_: "3", Journal(path, cases=2))
    assert VQA(**vqa)(predictor)["accuracy"] == 0.75
    assert len(predictor.asked) == 1
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["key"], row["answer"], row["score"]) for row in rows[2:]] == [("30", "2", 1), ("40", "3", 0)]
    assert [case["right"] for case in predictor.journal.shown] == [True, True, False]
    again = Talker(lambda *_: "3", Journal(path))
    VQA(**vqa, prompt="{question}")(again)
    assert len(again.asked) == 4  # another question is another answer


def test_an_answer_about_another_picture_is_not_used_again(
    vqa: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, changed = tmp_path / "out" / "predictions.jsonl", tmp_path / "val2014" / "COCO_val2014_000000000003.jpg"
    VQA(**vqa)(Talker(lambda *_: "2", Journal(path)))
    before = changed.stat()
    picture(changed, 200)
    changed.write_bytes(changed.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = Talker(lambda *_: "3", Journal(path))
    assert VQA(**vqa)(again)["accuracy"] == 0.75
    assert [question.split("?")[0] for question in again.asked] == ["how many 3"]
    assert "1 questions are asked again: their pictures have changed" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["picture"] for row in rows}) == 4


def test_answers_of_a_journal_that_does_not_say_what_was_shown_are_asked_again(
    vqa: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(
        lines(tmp_path / "p.jsonl", *({"key": f"{n}0", "question": f"how many {n}?", "answer": "3"} for n in range(1, 5)))
    )
    predictor = Talker(lambda *_: "2", Journal(path))
    assert VQA(**vqa, prompt="{question}")(predictor)["accuracy"] == 1.0
    assert len(predictor.asked) == 4
    assert f"4 questions are asked again: their pictures have changed, or {path} does not say" in capsys.readouterr().out
    later = Talker(lambda *_: "", Journal(path))
    assert VQA(**vqa, prompt="{question}")(later)["accuracy"] == 1.0
    assert not later.asked


def test_answers_with_other_marks_of_a_line_end_are_read_again(tmp_path: Path) -> None:
    Journal(tmp_path / "p.jsonl").add([("1", "what?", "one\u2028two\x85three\x0c")])
    assert Journal(tmp_path / "p.jsonl").answer("1", "what?") == "one\u2028two\x85three\x0c"


def thing(picture: np.ndarray) -> str:
    return ["dog", "cat", "pig"][picture[0, 0, 0] // 90]


def test_pictures_of_one_file_name_in_several_folders(tmp_path: Path) -> None:
    rows = ["image,caption"]
    for number, name in enumerate(("dog", "cat", "pig")):
        picture(tmp_path / name / "001.png", 100 * number)
        rows.append(f"{name}/001.png,a photo of a {name}")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    path = tmp_path / "out.jsonl"
    for _ in range(2):  # the second time from the file
        predictor = Talker(lambda picture, _: f"a photo of a {thing(picture)}", Journal(path))
        found = Captions(path=str(tmp_path / "captions.csv"), meteor=False)(predictor)
        assert (found["caption_exact_match"], found["samples"]) == (1.0, 3)
    assert not predictor.asked
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["dog/001.png", "cat/001.png", "pig/001.png"]


def test_pope_files_put_together_and_of_one_stem(tmp_path: Path) -> None:
    """Each official file counts its questions from 1 on, and the three share those whose answer is yes."""
    for number, name in enumerate(("dog", "cat")):
        picture(tmp_path / "val" / f"{name}.png", 100 * number)
    asked = [("dog", "dog", "yes"), ("cat", "dog", "no"), ("dog", "dog", "yes"), ("cat", "pig", "no")]
    rows = [
        {"question_id": 1 + n % 2, "image": f"{shown}.png", "text": f"Is there a {what}?", "label": label}
        for n, (shown, what, label) in enumerate(asked)
    ]
    lines(tmp_path / "pope" / "all.json", *rows)
    lines(tmp_path / "pope" / "all.jsonl", *({**row, "image": "cat.png", "label": "no"} for row in rows))
    predictor = Talker(lambda picture, question: "yes" if thing(picture) in question else "no", Journal(tmp_path / "out.jsonl"))
    found = POPE(path=str(tmp_path / "pope"), images=str(tmp_path / "val"))(predictor)
    assert (found["accuracy"], found["samples"]) == (1.0, 8)
    keys = [json.loads(line)["key"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert keys[:4] == ["all.json/1", "all.json/2", "all.json/1, line 3", "all.json/2, line 4"]
    assert len(set(keys)) == 8


@pytest.mark.parametrize("twice", ["path", "annotations"])
def test_a_question_id_that_comes_twice_is_refused(vqa: dict[str, str], twice: str) -> None:
    found = json.loads(Path(vqa[twice]).read_text())
    found["questions" if twice == "path" else "annotations"][3]["question_id"] = 20
    Path(vqa[twice]).write_text(json.dumps(found))
    predictor = Talker(lambda *_: "2")
    with pytest.raises(ValueError, match=r"(q|a)\.json: \w+ 1 and \w+ 3 have the same question_id 20; give each its own"):
        VQA(**vqa)(predictor)
    assert not predictor.asked


def test_samples_of_any_task_that_share_a_key_are_refused(tmp_path: Path) -> None:
    class Own(VQA):
        def cases(self, predictor: Any) -> list[Case]:
            return [Case(key, tmp_path / f"{n}.png", f"what is {n}?", ["2"]) for n, key in enumerate(("a", "b", "a"))]

    predictor = Talker(lambda *_: "2")
    with pytest.raises(ValueError, match=r"key 'a': sample 1 \(.*0.png, 'what is 0\?'\) and sample 3 \(.*2.png, 'what is 2\?'\)"):
        Own()(predictor)
    assert not predictor.asked


def test_a_question_that_is_too_long_costs_only_itself(vqa: dict[str, str]) -> None:
    predictor = Talker(lambda *_: "2")
    plain = predictor.answer

    def answer(pictures: Any, questions: Any, *rest: Any, **search: Any) -> list[str]:
        if any("2" in question for question in questions):
            raise ValueError("too long")
        return plain(pictures, questions, *rest, **search)

    predictor.answer = answer
    found = VQA(**vqa, max_missing=0.5)(predictor)
    assert (found["samples"], predictor.journal.missing) == (3, {"20": "too long"})


def test_pope_files(tmp_path: Path) -> None:
    picture(tmp_path / "val2014" / "1.jpg")
    for part in ("random", "popular"):
        said = enumerate(["yes", "no", "no"])
        rows = [{"question_id": n, "image": "1.jpg", "text": f"is it {n}?", "label": label} for n, label in said]
        lines(tmp_path / f"coco_pope_{part}.json", *rows)
    predictor = Talker(lambda _, question: "No." if "2" in question else "Yes")
    found = POPE(path=str(tmp_path), images=str(tmp_path / "val2014"))(predictor)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["precision"], found["recall"], found["f1_random"]) == (0.5, 1.0, pytest.approx(2 / 3))
    assert (found["yes_share_popular"], found["accuracy_chance"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    with pytest.raises(ValueError, match="label 'maybe' is neither yes nor no"):
        POPE(path=lines(tmp_path / "x.jsonl", {"image": "1.jpg", "text": "?", "label": "maybe"}))(predictor)


def test_mme_folder(tmp_path: Path) -> None:
    for folder, texts in (("count", ""), ("artwork", "questions_answers_YN")):
        for stem in ("a", "b"):
            picture(tmp_path / folder / ("images" if texts else "") / f"{stem}.png")
            (tmp_path / folder / texts).mkdir(exist_ok=True)
            (tmp_path / folder / texts / f"{stem}.txt").write_text("is it one?\tYes\nis it two?\tNo\n")
    predictor = Talker(lambda _, question: "Yes")
    found = MME(path=str(tmp_path))(predictor)
    assert (found["count_accuracy"], found["count_accuracy_plus"], found["artwork_score"]) == (0.5, 0.0, 50.0)
    assert (found["perception"], found["perception_chance"], found["samples"]) == (100.0, 150.0, 8)
    (tmp_path / "count" / "a.png").unlink()
    (tmp_path / "artwork" / "images" / "b.png").write_text("no picture")
    assert MME(path=str(tmp_path), max_missing=0.5)(Talker(lambda *_: ""))["samples"] == 4
    with pytest.raises(ValueError, match="is no MME folder"):
        MME(path=str(tmp_path / "count" / "b.png"))


def test_refer_files(tmp_path: Path) -> None:
    picture(tmp_path / "train2014" / "1.jpg")
    row = {"image": "data/coco/train2014/1.jpg", "sent": "left one", "bbox": [0, 0, 20, 20], "width": 40, "height": 20}
    path = lines(tmp_path / "refcoco.jsonl", row, row | {"sent": "right one"}, row | {"sent": "none"})
    said = {"left": "<box>(0,0),(500,1000)</box>", "right": "[[0, 0, 240, 1000]]", "none": "no"}
    predictor = Talker(lambda _, question: next(text for word, text in said.items() if f"<ref>{word}" in question))
    found = Referring(path=path)(predictor)
    assert (found["accuracy_at_0.5"], found["answers_with_box"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_coco_captions(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        picture(tmp_path / name)
    said = ["a man's hat on a bed", "two dogs (brown) in the snow"]
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)]
    notes = [{"image_id": n, "caption": text} for n, text in ((1, said[0]), (1, "a hat"), (2, said[1]))]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    texts = iter(said)
    task = Captions(path=str(tmp_path / "captions.json"), meteor=False)
    found = task(predictor := Talker(lambda *_: next(texts)))
    assert (found["caption_exact_match"], found["caption_bleu_4"]) == (1.0, pytest.approx(1.0))
    first, second = task.grades(task.cases(predictor), said)
    assert (second, found["caption_cider"]) == (pytest.approx(10), pytest.approx((first + second) / 2))
    assert predictor.asked[0] == "Provide a one-sentence caption for the provided image."


@pytest.mark.parametrize(
    ("task", "metric", "best"),
    [
        (VQA, "accuracy", 1),
        (POPE, "f1", 1),
        (MME, "perception", 800),
        (Referring, "accuracy_at_0.5", 1),
        (Captions, "caption_bleu_4", 1),
    ],
)
def test_true_answers_about_scenes_are_right(task: type[AnswerTask], metric: str, best: float) -> None:
    task = task(samples=12, **({"meteor": False} if task is Captions else {}))
    cases = task.cases(Talker(lambda *_: ""))
    assert len({case.key for case in cases}) == len(cases) >= 12
    texts = (task.truth_text(case).split(" / ")[0].split(" (")[0] for case in cases)  # they are asked in order
    found = task(Talker(lambda *_: next(texts)))
    assert found[metric] == pytest.approx(best)
    assert found["samples"] == 12


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="path=/nowhere: there is no such file or folder"):
        POPE(path="/nowhere")
    with pytest.raises(ValueError, match=r"prompt='what\?' has no place for the question; write \{question\}"):
        VQA(prompt="what?")
    with pytest.raises(ValueError, match="go together; give both or none"):
        VQA(path=__file__)
    with pytest.raises(ValueError, match="writer='middlware' is not known; did you mean 'middleware'"):
        Captions(writer="middlware")
