"""Records as other projects publish them: what each is read as, and what of it is said to be unread."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_records import CODED, READ, A, B, png, said, user
from runs import ROOT
from test_conversations import FORMATS

from lightning_internvl.data.bad_samples import BadSample, kind_of
from lightning_internvl.data.files.conversations import read_entry
from lightning_internvl.data.files.datasets import ChatsFile
from lightning_internvl.data.files.record_sources import open_records


@pytest.mark.parametrize("name", READ)
def test_read_whole(name: str) -> None:
    record, texts, images, videos = READ[name]
    entry = read_entry(record)
    assert [message["content"] for message in entry.messages] == texts
    assert (entry.images, entry.videos, entry.unread) == (images, videos, [])


def test_the_table_of_formats_names_a_test_for_each_row_and_each_record() -> None:
    lines = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
    rows = [
        line.split(" | ") for line in lines if line.startswith("| ") and not line.startswith(("| ---", "| format", "| what |"))
    ]
    named = [re.findall(r"`([^`]+)`", cells[-1]) for cells in rows]
    assert len(named) > 10
    assert all(named)
    names = set(itertools.chain(*named))
    files = [Path(__file__), Path(__file__).with_name("test_conversations.py")]
    tests = set(re.findall(r"^def (test_\w+)", "".join(file.read_text(encoding="utf-8") for file in files), re.MULTILINE))
    assert names <= tests | set(READ) | set(FORMATS)
    assert set(READ) - names == {"a byte order mark", "bytes and a name"}  # which are no format


def test_the_answer_that_has_no_weight_is_read_and_not_learnt() -> None:
    turns = [user("a"), said("b", weight=0), user("c"), said("d", weight=1), user("e"), said("f", loss=False)]
    entry = read_entry({"messages": turns})
    assert [message.get("learnt", True) for message in entry.messages if message["role"] == "assistant"] == [False, True, False]
    assert entry.unread == []
    with pytest.raises(BadSample, match="the weight of every answer is 0"):
        read_entry({"messages": turns[:2]})


UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "a key": ({"messages": [user("a"), said()], "hint": "b"}, "key 'hint'"),
    "a key of a message": ({"messages": [user("a", attachments=["x"]), said()]}, "key 'attachments' of a message"),
    "a key of a part": (
        {"images": [A], "messages": [user([{"type": "image", "min_pixels": 3}]), said()]},
        "key 'min_pixels' of a part",
    ),
    "choices": ({"question": "Which?", "choices": ["a", "b"], "answer": "a"}, "key 'choices'"),
    "another picture": ({"image": A, "picture": "in oil", "caption": "x"}, "key 'picture'"),
    "a mark": ({"messages": [user("<picture_here> What?"), said()]}, "mark '<picture_here>'"),
    "a mark in an answer": ({"messages": [user("a"), said("see <image1>")]}, "mark '<image1>'"),
    "a path": ({"messages": [user("What is in photos/a.jpg?"), said()]}, "name of a picture in a text"),
    "half a weight": ({"messages": [user("a"), said(weight=0.5)]}, "loss weight 0.5 of an answer"),
    "a question to be learnt": ({"messages": [user("a", loss=True), said()]}, "loss weight True of a user message"),
    "an open question": (
        {"messages": [user("a"), said(), user("b")]},
        "a question without an answer, or an answer without a question",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_said(name: str) -> None:
    record, phrase = UNREAD[name]
    assert read_entry(record).unread == [phrase]


def test_a_picture_may_be_named_twice() -> None:
    for more in ({"images": [A]}, {"image_path": f"/mine/{A}"}):
        entry = read_entry({"image": f"train/{A}", "caption": "x", **more})
        assert (entry.images, entry.unread) == ([f"train/{A}"], [])


def test_what_is_said_about_a_record_is_no_content() -> None:
    record = {"id": 3, "width": 4, "source": "x", "relevance_ratings": [5], "hint": None, "score": 0.5, "html": ""}
    assert read_entry({**record, "messages": [user('<p>a</p> <img src="x"> 2 < 3'), said()]}).unread == []


REFUSED = {
    "unknown format": [
        {"image": A, "caption": ["x"]},
        {"image": A, "caption": 3},
        {"messages": [user(3), said()]},
        {"messages": [user("a"), said(None)]},
        {"question": "a", "answer": 4, "image": A},
        {"question": "a", "answers": ["b", "c"], "image": A},
        {"conversations": "[{'from': 'human'}]"},
    ],
    "broken text": [
        {"image": A, "caption": "a \ud800 cat"},
        {"messages": [user("\udcff"), said()]},
        {"question": "a", "answer": "\ud83d"},
    ],
    "empty caption": [{"image": A, "caption": float("nan")}],
    "placeholders": [
        {"images": [A, B], "messages": [user("<image1> <image1>"), said()]},
        {"images": [A, B], "messages": [user("<image1> <image>"), said()]},
        {"messages": [user("<image><image>", images=[A]), said()]},
        {"messages": [user("<ImageHere>"), said()]},
        {"image": A, "images": [B], "messages": [user("<image>"), said()]},
        {"image": A, "image_path": B, "caption": "x"},
        {"video": "a.mp4", "videos": ["b.mp4"], "messages": [user("<video>"), said()]},
        {"messages": [user("<image>", image=A, images=[A, B]), said()]},
    ],
    "unreadable image": [{"image": "data:image/png;base64,####", "caption": "x"}],
}


@pytest.mark.parametrize(("kind", "record"), [(kind, record) for kind, records in REFUSED.items() for record in records])
def test_refused(kind: str, record: dict[str, Any]) -> None:
    with pytest.raises(BadSample) as raised:
        read_entry(record)
    assert kind_of(raised.value) == kind


def test_a_long_text_is_cut_in_messages() -> None:
    for record in (
        {"messages": ["x" * 100_000]},
        {"image": {"bytes": None, "x": "y" * 100_000}, "caption": "x"},
        {"image": CODED * 999 + "#", "caption": "x"},
        {"x" * 9999: 1},
    ):
        with pytest.raises(BadSample) as raised:
            read_entry(record)
        assert len(str(raised.value)) < 600


def test_a_picture_stays_with_its_question() -> None:
    turns = [said("Welcome"), user("hello"), said("hi"), user("<image>What is this?")]
    assert read_entry({"image": A, "messages": turns}).images == []
    assert [message["content"] for message in read_entry({"image": A, "messages": turns}).messages] == ["hello", "hi"]
    entry = read_entry({"images": [A, B], "messages": [user("<image>a"), said("b"), user("<image>c")]})
    assert entry.images == [A]


def test_meta_files_mix_sets_by_their_repeat_time(tmp_path: Path) -> None:
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        (tmp_path / name / A).write_bytes(png(colour))
        lines = [json.dumps({"image": A, "conversations": [user(f"{name} {k}?"), said()]}) for k in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sets = {"one": {"root": "one/", "annotation": "one.jsonl", "repeat_time": 2, "length": 4, "data_augment": False}}
    sets["two"] = {"root": "two", "annotation": "two.jsonl", "repeat_time": 0.5, "data_augment": True}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    data = ChatsFile(tmp_path / "meta.json")
    asked = [data[place]["conversation"][0]["content"] for place in range(len(data))]
    assert asked == [f"<image>\n{text}?" for text in [f"one {k}" for k in (0, 1, 2, 3, 0, 1, 2, 3)] + ["two 0", "two 2"]]
    assert np.array_equal(data[9]["images"][0][0, 0], [0, 0, 255])
    account = data.unread()
    assert (account.records, account.incomplete, dict(account.kinds)) == (10, 2, {"key 'data_augment' of a set": 2})
    given = [
        {"path": str(tmp_path / "one.jsonl"), "weight": 1.5, "image_root": str(tmp_path / "one")},
        str(tmp_path / "two.jsonl"),
    ]
    assert len(ChatsFile(given)) == 6 + 4


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"path": "x.jsonl", "weigth": 2}, "an entry has no 'weigth'; did you mean 'weight'"),
        ({"path": "x.jsonl", "weight": 0}, "weight=0 must be a number above 0"),
        ({"weight": 2}, "an entry needs a path"),
    ],
)
def test_faults_of_weighted_sets(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_records([given])


def test_an_account_is_refused_above_its_share(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": [user("a"), said()], **({"hint": "b"} if k % 4 == 0 else {})}) + "\n" for k in range(100))
    )
    account = ChatsFile(path).unread()
    assert (account.records, account.incomplete) == (100, 25)
    assert account.fault(0.25) is None
    fault = account.fault(0.2)
    assert fault is not None
    assert "25 of 100 records hold something that is not read: key 'hint' (25); more than data.max_unread_fraction=0.2" in fault


def test_files_in_other_encodings_and_shapes_are_named(tmp_path: Path) -> None:
    records = [{"messages": [user("Wie heißt es?"), said("Käse")]}]
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    cases: dict[str, tuple[bytes, str]] = {
        "utf16.jsonl": (text.encode("utf-16"), "utf16.jsonl: .*UTF-16.*iconv"),
        "utf16.json": (json.dumps(records).encode("utf-16-le"), "utf16.json: .*UTF-16.*iconv"),
        "latin.json": (json.dumps(records, ensure_ascii=False).encode("latin-1"), "latin.json is no text in UTF-8.*iconv"),
        "latin.jsonl": (text.encode("latin-1"), "latin.jsonl, line 1: not in UTF-8.*iconv"),
        "pretty.jsonl": (json.dumps(records, indent=2).encode(), "pretty.jsonl holds a JSON list, .*ends in .json"),
        "long.jsonl": (json.dumps(records[0], indent=2).encode(), "long.jsonl: its first record goes over several lines"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            open_records(tmp_path / name)[0].read(0)
    (tmp_path / "UPPER.JSONL").write_text(text, encoding="utf-8-sig")
    assert len(ChatsFile(tmp_path / "UPPER.JSONL")) == 1


def test_a_picture_that_is_not_there_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "coco/a.png", "caption": "a"}))
    with pytest.raises(ValueError, match=r"coco/a\.png does not exist.*data\.image_root=FOLDER"):
        ChatsFile(tmp_path / "x.jsonl")[0]


def test_frames_are_read_as_a_video(tmp_path: Path) -> None:
    for name, colour in (("1.png", "red"), ("2.png", "blue")):
        (tmp_path / name).write_bytes(png(colour))
    (tmp_path / "x.jsonl").write_text(json.dumps({"video": ["2.png", "1.png"], "messages": [user("What?"), said()]}))
    ((frames, rate),) = ChatsFile(tmp_path / "x.jsonl")[0]["videos"]
    assert frames.shape == (2, 8, 8, 3)
    assert (frames[:, 0, 0].tolist(), rate) == ([[0, 0, 255], [255, 0, 0]], 2.0)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_name_with_two_values_is_refused(name: str, tmp_path: Path) -> None:
    record = '{"image": "a.png", "caption": "a", "image": "b.png"}'
    (tmp_path / name).write_text(record if name.endswith("l") else f"[{record}]")
    (found,) = open_records(tmp_path / name)[0].scan()
    assert "'image' stands in it twice" in str(found.error)
