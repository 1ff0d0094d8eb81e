"""Small files in the form of the public benchmarks, with pictures of one colour, and models that answer by a rule."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.inference.journal import Journal

TEXTS = ("red", "a dog", "two dogs", "7 cm", "Paris, France", "none of these", "it grows", "x = 3", "50%", "blue boats")
LETTERS = "ABCD"


class Talker:
    """A predictor whose model answers questions about pictures by a rule."""

    def __init__(self, rule: Callable[[list[np.ndarray], str], str], journal: Journal | None = None, video: bool = False) -> None:
        self.rule, self.journal, self.asked = rule, journal or Journal(), []
        self.held_out, self.pairs, self.batch_size = HeldOutScenes(seed=0, image_size=24), None, 3
        self.chats = SimpleNamespace(processor=SimpleNamespace(max_tiles=1), reads_videos=video)

    def answer(self, pictures: Sequence[np.ndarray], questions: Sequence[str], tokens: int, **search: Any) -> list[str]:
        self.asked += questions
        return [self.rule([picture], question) for picture, question in zip(pictures, questions, strict=True)]

    def complete(self, samples: Sequence[dict[str, Any]], tokens: int, **search: Any) -> list[str]:
        questions = [sample["conversation"][-1]["content"] for sample in samples]
        self.asked += questions
        shown = [sample["images"] + [frames for frames, _ in sample.get("videos", ())] for sample in samples]
        return [self.rule(pictures, question) for pictures, question in zip(shown, questions, strict=True)]


def png(value: int) -> bytes:
    """A picture of one grey, whose base64 has more letters than the index of a row."""
    stream = io.BytesIO()
    Image.fromarray(np.full((9, 9, 3), value % 256, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def stored(value: int) -> dict[str, Any]:
    return {"bytes": png(value), "path": f"{value}.png"}


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def tsv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def options(number: int, count: int = 4) -> list[str]:
    return [TEXTS[(number + step) % len(TEXTS)] for step in range(count)]


def mmmu(folder: Path, count: int = 24) -> Path:
    """Every fourth question is open; every other one shows two pictures, one of them in an option."""
    for subject in ("Art", "Math"):
        rows = []
        for number in range(1, count // 2 + 1):
            listed = options(number, 2 + number % 3)
            if number % 2:
                listed[1] = "<image 2>"
            is_open = number % 4 == 0
            truths = ["3.50", "seven"][: 1 + number % 8 // 4]
            answer = (truths[0] if len(truths) == 1 else str(truths)) if is_open else LETTERS[number * 7 % len(listed)]
            text = f"What of {subject} {number} is in <image 1>?"
            own = {"image_1": stored(number), "image_2": None if is_open or number % 2 == 0 else stored(100 + number)}
            row = {"id": f"validation_{subject}_{number}", "question": text, "options": str([] if is_open else listed), **own}
            rows.append(row | {"answer": answer, "question_type": "open" if is_open else "multiple-choice"})
        parquet(folder / subject / "validation-00000-of-00001.parquet", rows)
    return folder


def mmbench(folder: Path, questions: int = 12, copies: bool = True) -> Path:
    """Two to four options in all their rotations; a copy names the row of its picture."""
    rows = []
    for step in range(4 if copies else 1):
        for number in range(1, questions + 1):
            own = options(number, 2 + number % 3)
            if step < len(own):
                turned = own[step:] + own[:step]
                image = base64.b64encode(png(number)).decode() if step == 0 else str(number)
                row = {"index": number + 1_000_000 * step, "question": f"what\nis {number}?", "hint": "a hint" * (number % 2)}
                row |= dict(zip(LETTERS, [*turned, "", ""], strict=False))
                place = (number * 7 % len(own) - step) % len(own)
                row |= {"answer": LETTERS[place], "category": f"kind {number % 4}", "l2-category": f"ability {number % 2}"}
                rows.append(row | {"image": image})
    return tsv(folder / "MMBench_DEV_EN.tsv", rows)


def mmstar(folder: Path, count: int = 24) -> Path:
    rows = []
    for number in range(count):
        said = ", ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, options(number), strict=True))
        row = {"index": number, "question": f"what is {number}?\nOptions: {said}", "image": png(number)}
        rows.append(
            row | {"answer": LETTERS[number * 7 % 4], "category": f"core {number % 2}", "l2_category": f"axis {number % 3}"}
        )
    return parquet(folder / "mmstar.parquet", rows)


def ai2d(folder: Path, count: int = 24) -> Path:
    rows = [
        {"question": f"which is {n}?", "options": options(n), "answer": str(n * 7 % 4), "image": stored(n)} for n in range(count)
    ]
    return parquet(folder / "ai2d.parquet", rows)


def docvqa(folder: Path, count: int = 24) -> Path:
    rows = [
        {"questionId": n, "question": f"what is {n}?", "question_types": [f"kind {n % 2}"], "image": f"documents/{n}.png"}
        | {"answers": [TEXTS[n % 7], TEXTS[n % 7].upper() + "."]}
        for n in range(count)
    ]
    pictures(folder / "documents", count)
    return saved(folder / "val_v1.0.json", {"dataset_name": "docvqa", "data": rows})


def chartqa(folder: Path, count: int = 24) -> Path:
    labels = ("14", "0.57", "Yes", "23%", "No", "Italy")
    for part in ("human", "augmented"):
        rows = [{"imgname": f"{n}.png", "query": f"{part} {n}?", "label": labels[n % 6]} for n in range(count // 2)]
        saved(folder / f"test_{part}.json", rows)
    pictures(folder / "png", count // 2)
    return folder


def ocrbench(folder: Path, count: int = 24) -> Path:
    rows = [
        {"dataset_name": "HME100k" if n % 6 == 0 else "IIIT5K", "id": n % 5, "image_path": f"set/{n}.png", "question": f"{n}?"}
        | {"answers": "x _ { 1 }" if n % 6 == 0 else [TEXTS[n % 7], "Centre"][: 1 + n % 2], "type": f"type {n % 3}"}
        for n in range(count)
    ]
    pictures(folder / "set", count)
    return saved(folder / "OCRBench.json", rows)


def textvqa(folder: Path, count: int = 24) -> Path:
    rows = [
        {
            "question_id": 34602 + n,
            "question": f"what {n}?",
            "image_id": f"id{n}",
            "answers": [TEXTS[n % 7]] * 7 + [f"no {n}"] * 3,
        }
        for n in range(count)
    ]
    for n in range(count):
        (folder / f"id{n}.jpg").write_bytes(png(n))
    return saved(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "TextVQA", "data": rows})


def mathvista(folder: Path, count: int = 24) -> Path:
    kinds = [("text", None, "", None), ("integer", None, "12", "g"), ("float", 1.0, "1.2", None), ("list", None, "[1, 2]", None)]
    problems = {}
    for n in range(1, count + 1):
        kind, precision, answer, unit = kinds[n % 4]
        listed = options(n) if kind == "text" else None
        about = {"task": f"task {n % 3}", "skills": ["algebra", "logic"][: 1 + n % 2]}
        problems[str(n)] = {"question": f"what is {n}?", "image": f"images/{n}.jpg", "choices": listed, "unit": unit} | {
            "precision": precision, "answer": listed[n * 7 % 4] if listed else answer, "metadata": about, "answer_type": kind,
            "question_type": "multi_choice" if listed else "free_form",
        }  # fmt: skip
    pictures(folder / "images", count + 1, "jpg")
    return saved(folder / "testmini.json", problems)


def video_mme(folder: Path, count: int = 24) -> Path:
    rows = [
        {
            "question_id": f"{n // 3:03d}-{n % 3}",
            "videoID": f"v{n // 3}",
            "question": f"what is {n}?",
            "task_type": "OCR Problems",
        }
        | {"options": [f"{letter}. {text}" for letter, text in zip(LETTERS, options(n), strict=True)]}
        | {"answer": LETTERS[n * 7 % 4], "duration": ("short", "medium", "long")[n // 3 % 3], "domain": f"domain {n // 3 % 2}"}
        for n in range(count)
    ]
    for video in range(count // 3):
        pictures(folder / "data" / f"v{video}", 5, values=[10 * video + step for step in range(5)])
    return parquet(folder / "videomme" / "test-00000-of-00001.parquet", rows)


def pictures(folder: Path, count: int, kind: str = "png", values: Sequence[int] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values or range(count)):
        (folder / f"{number}.{kind}").write_bytes(png(value))


FILES: dict[str, Callable[[Path], Path]] = {
    "mmmu": mmmu, "mmbench": mmbench, "mmstar": mmstar, "ai2d": ai2d, "docvqa": docvqa, "chartqa": chartqa,
    "ocrbench": ocrbench, "textvqa": textvqa, "mathvista": mathvista, "video_mme": video_mme,
}  # fmt: skip
