"""Records of a query, its document and wrong documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.conversations import read_entry
from lightning_internvl.data.files.datasets import ChatsFile, PairsFile

READ = [
    ({"query": "a cat", "positive": {"image": "a.png"}}, "a cat", "<image>", ["a.png"], 0),
    ({"anchor": "a cat", "positive": "a tame animal", "negative": "a dog"}, "a cat", "a tame animal", [], 1),
    (
        {"query": {"text": "what is it?", "image": "a.png"}, "positive": "a cat", "negatives": ["a dog", {"image": "b.png"}]},
        "<image>\nwhat is it?",
        "a cat",
        ["a.png", "b.png"],
        2,
    ),
    (
        {"query": {"text": "from <image> to <image>", "images": ["a.png", "b.png"]}, "positive": "it grows"},
        "from <image> to <image>",
        "it grows",
        ["a.png", "b.png"],
        0,
    ),
]


@pytest.mark.parametrize(("record", "query", "positive", "pictures", "wrong"), READ)
def test_texts_and_pictures_are_read(record: dict[str, Any], query: str, positive: str, pictures: list[str], wrong: int) -> None:
    entry = read_entry(record)
    assert entry.passages is not None
    assert (entry.passages.query.text, entry.passages.positive.text) == (query, positive)
    assert (entry.images, len(entry.passages.negatives), entry.unread) == (pictures, wrong, [])


FAULTS = [
    ({"query": "a cat"}, "it has no 'positive'; give 'positive' beside 'query'"),
    ({"positive": "a cat"}, "it has no 'query'; give 'query' beside 'positive'"),
    ({"query": "a cat", "positive": {"text": " "}}, "the positive is empty; give a text, a picture or both"),
    ({"query": "a", "positive": "b", "negatives": ["c", "b"]}, "negative 1 equals the positive"),
    ({"query": "a", "positive": {"image": "a.png"}, "negatives": [{"image": "a.png"}]}, "negative 0 equals the positive"),
    ({"query": "a", "positive": "cat.png"}, "the positive is the path of a picture"),
    ({"query": {"text": "<image> or <image>", "image": "a.png"}, "positive": "b"}, "the query has 1 pictures but 2 '<image>'"),
    ({"query": "a", "positive": 3}, "the positive is no text"),
    ({"query": "a", "positive": {"text": "b", "sound": "c.wav"}}, "the positive has 'sound'"),
]


@pytest.mark.parametrize(("record", "fault"), FAULTS)
def test_faults_are_named(record: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadSample, match=fault):
        read_entry(record)


def test_a_file_gives_samples_and_names_a_fault_by_line(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    good = {"query": "red", "positive": {"image": "a.png"}, "negatives": ["blue"]}
    bad = {"query": "red", "positive": "blue", "negatives": ["blue"], "id": "seven"}
    answered = {"query": "<image>red?", "response": "yes", "images": ["a.png"]}
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, (good, bad, answered))))
    data = PairsFile(tmp_path / "x.jsonl")
    assert data[0]["query"] == {"text": "red", "images": []}
    assert data[0]["positive"]["images"][0].shape == (4, 6, 3)
    assert [one["text"] for one in data[0]["negatives"]] == ["blue"]
    with pytest.raises(BadSample, match=r"x\.jsonl, line 2 \(id seven\): negative 0 equals the positive"):
        data[1]
    with pytest.raises(BadSample, match="it is a conversation"):
        data[2]
    with pytest.raises(BadSample, match="it has a query and documents, and this stage reads conversations"):
        ChatsFile(tmp_path / "x.jsonl")[0]
