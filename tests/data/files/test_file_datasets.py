"""Pairs and conversations from files, and what is said when a record is broken."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.files.datasets import ChatsFile, PairsFile
from lightning_internvl.data.files.records import RecordFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture of 30 x 20 px, a.png."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path


def write_list(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n\n" for record in records), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), "utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["image", "caption"], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_pairs(folder: Path, suffix: str) -> None:
    records = [{"image": "a.png", "caption": text} for text in ("one, \"two\"", "两只猫", "three")]  # fmt: skip
    data = PairsFile(write_list(folder / f"list.{suffix}", records))
    assert len(data) == 3
    assert [data[i]["caption"] for i in (2, 0, 1)] == ["three", 'one, "two"', "两只猫"]
    assert data[1]["image"].shape == (20, 30, 3)
    assert data[1]["image_id"] == "a.png"
    assert data[1]["key"] == {"jsonl": "list.jsonl:3", "json": "list.json:6"}.get(suffix, f"list.{suffix}:3")
    with pytest.raises(IndexError):
        data[3]
    assert len(PairsFile(folder / f"list.{suffix}", length=2)) == 2


def test_broken_records_name_file_and_line(folder: Path) -> None:
    path = folder / "list.jsonl"
    lines = ['{"image": "a.png", "caption": " "}', '{"image": "b.png", "caption": "x"}', '{"image": "a.png"}', "{", "[1]"]
    path.write_text("\n".join(lines))
    data = PairsFile(path)
    reasons = [
        "the caption is empty",
        "image .*b.png does not exist",
        ".*caption missing",
        "not a record",
        "not a record, but a list",
    ]
    for position, reason in enumerate(reasons):
        with pytest.raises(ValueError, match=rf"list\.jsonl, line {position + 1}: {reason}"):
            data[position]
    with pytest.raises(ValueError, match=r"'\.txt'.*jsonl"):
        PairsFile(folder / "list.txt")
    with pytest.raises(ValueError, match="does not exist"):
        PairsFile(folder / "none.csv")
    with pytest.raises(ValueError, match=r"no file of conversations is given; give data\.path=FILE or data\.chats_path=FILE"):
        ChatsFile(None)


def test_lists_of_records_are_found_by_their_bytes(folder: Path) -> None:
    records = [{"n": 0, "t": "é]}\\\""}, {"n": 1, "deep": [{"a": []}]}, {"n": 2}]  # fmt: skip
    for text in (json.dumps(records, ensure_ascii=False), "\ufeff \n" + json.dumps(records, indent=2, ensure_ascii=False) + "\n"):
        (folder / "list.json").write_text(text, "utf-8")
        file = RecordFile(folder / "list.json")
        assert [file.read(i)[0] for i in range(len(file))] == records
    assert [file.read(i)[1] for i in range(3)] == [3, 7, 15]
    (folder / "list.json").write_text("[]")
    assert len(RecordFile(folder / "list.json")) == 0
    (folder / "list.json").write_text('{"n": 0}')
    with pytest.raises(ValueError, match=r"list\.json: not a JSON list"):
        len(RecordFile(folder / "list.json"))
    (folder / "list.json").write_text('[{"n": 0},\n{"n": ]')
    with pytest.raises(ValueError, match=r"list\.json, line 2: not a record"):
        len(RecordFile(folder / "list.json"))


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


CHATS = {
    "llava": ({"id": 1, "image": "a.png", "conversations": [human("<image>\nwhat?"), gpt("a cat")]}, 1, "<image>\nwhat?"),
    "two": ({"image": ["a.png", "a.png"], "conversations": [human("<image>, <image>?"), gpt("cats")]}, 2, "<image>, <image>?"),
    "no mark": ({"image": "a.png", "conversations": [human("what?"), gpt("a cat")]}, 1, "<image>\nwhat?"),
    "text": ({"conversations": [human("what?"), gpt("a cat")]}, 0, "what?"),
    "loose ends": ({"conversations": [gpt("hi"), human("what?"), gpt("a cat"), human("and?")]}, 0, "what?"),
    "messages": (
        {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}], "images": ["a.png"]},
        1,
        "<image>\nwhat?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_conversations(folder: Path, kind: str, suffix: str) -> None:
    record, pictures, question = CHATS[kind]
    sample = ChatsFile(write_list(folder / f"chats.{suffix}", [record]))[0]
    assert [image.shape for image in sample["images"]] == [(20, 30, 3)] * pictures
    assert [message["role"] for message in sample["conversation"]] == ["user", "assistant"]
    assert sample["conversation"][0]["content"] == question
    assert sample["key"] == f"chats.{suffix}:{2 if suffix == 'json' else 1}" + (" (id 1)" if kind == "llava" else "")


def test_a_system_message_stays(folder: Path) -> None:
    record = {"conversations": [{"from": "system", "value": "Be kind."}, gpt("hi"), human("what?"), gpt("a cat")]}
    sample = ChatsFile(write_list(folder / "chats.jsonl", [record]))[0]
    assert [message["role"] for message in sample["conversation"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, r"neither a conversation .* nor a record with image and caption: image missing among \['text'\]"),
        ({"conversations": []}, "no question with an answer"),
        ({"conversations": [human("what?")]}, "no question with an answer"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "role 'robot' is unknown; it must be one of human, user, gpt"),
        ({"conversations": [human("<image> what?"), gpt("a")]}, "0 pictures but 1 '<image>' marks"),
        ({"image": ["a.png", "a.png"], "conversations": [human("<image>"), gpt("a")]}, "2 pictures but 1"),
        ({"image": "none.png", "conversations": [human("<image>"), gpt("a")]}, "none.png does not exist"),
        ({"image": [3], "conversations": [human("<image>"), gpt("a")]}, "3 is no path"),
        ({"conversations": 3}, "not a list of messages"),
    ],
)
def test_broken_conversations(folder: Path, record: dict[str, Any], reason: str) -> None:
    data = ChatsFile(write_list(folder / "chats.jsonl", [{}, record]))
    with pytest.raises(ValueError, match=rf"chats\.jsonl, line 3: .*{reason}"):
        data[1]


def test_pictures_below_another_folder(folder: Path) -> None:
    (folder / "lists").mkdir()
    path = write_list(folder / "lists" / "list.jsonl", [{"image": "a.png", "caption": "x"}])
    assert PairsFile(path, image_root=folder)[0]["image"].shape == (20, 30, 3)
