"""Records in every format that people have, and what is said of those that cannot be used."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from lightning_internvl.data.bad_samples import BadSample, Unwanted, kind_of
from lightning_internvl.data.files.conversations import check_boxes, read_entry
from lightning_internvl.data.files.datasets import ChatsFile, PairsFile
from lightning_internvl.data.files.record_sources import JoinedRecords, open_records

ASKED = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]


def turns(*texts: str) -> list[dict[str, str]]:
    """LLaVA's turns, question and answer in turn."""
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def messages(content: Any, answer: Any = "a cat") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


PART = {"type": "image"}
TEXT = {"type": "text", "text": "what?"}
FORMATS = {
    "llava": ({"image": "a.png", "conversations": turns("<image>\nwhat?", "a cat")}, "<image>\nwhat?", ["a.png"], []),
    "internvl, several": (
        {"image": ["a.png", "b.png"], "conversations": turns("<image><image>what?", "cats")}, "<image><image>what?",
        ["a.png", "b.png"], [],
    ),
    "no mark": ({"images": ["a.png", "b.png"], "messages": ASKED}, "<image>\n<image>\nwhat?", ["a.png", "b.png"], []),
    "none": ({"image": "", "conversations": turns("what?", "a cat")}, "what?", [], []),
    "parts": ({"images": ["a.png"], "messages": messages([PART, TEXT])}, "<image>\nwhat?", ["a.png"], []),
    "parts with paths": (
        {"images": ["b.png"], "messages": messages([TEXT, {**PART, "image": "a.png"}, PART])}, "what?<image>\n<image>\n",
        ["a.png", "b.png"], [],
    ),
    "parts as chat services write them": (
        {"messages": messages([{"type": "image_url", "image_url": {"url": "file:///x/a.png"}}, TEXT])}, "<image>\nwhat?",
        ["/x/a.png"], [],
    ),
    "parts in answers": ({"messages": messages([TEXT], [{"type": "text", "text": "a cat"}])}, "what?", [], []),
    "video": ({"video": "a.mp4", "conversations": turns("what?", "a cat")}, "<video>\nwhat?", [], ["a.mp4"]),
    "video part": ({"messages": messages([{"type": "video", "video": "frames"}, TEXT])}, "<video>\nwhat?", [], ["frames"]),
    "bytes": ({"images": [{"bytes": b"abc", "path": None}], "messages": ASKED}, "<image>\nwhat?", [b"abc"], []),
    "a question left open": (
        {"messages": [*ASKED, {"role": "user", "content": [PART]}], "images": []}, "what?", [], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    record, question, images, videos = FORMATS[kind]
    entry = read_entry(json.loads(json.dumps(record)) if kind != "bytes" else record)
    assert [message["role"] for message in entry.messages] == ["user", "assistant"]
    assert (entry.messages[0]["content"], entry.images, entry.videos) == (question, images, videos)
    assert entry.caption is None


@pytest.mark.parametrize("names", [("image", "caption"), ("image_path", "caption"), ("file_name", "text"), ("images", "text")])
def test_a_caption_answers_the_request(names: tuple[str, str]) -> None:
    entry = read_entry({names[0]: "a.png", names[1]: " a cat "}, "what is it?")
    assert [message["content"] for message in entry.messages] == ["<image>\nwhat is it?", "a cat"]
    assert (entry.images, entry.caption) == (["a.png"], "a cat")


FAULTS = {
    "unknown format": ({"foo": 1}, r"image and caption missing among \['foo'\]"),
    "unknown role": ({"conversations": [{"from": "robot", "value": "a"}]}, "role 'robot' is unknown; .*human, user, gpt"),
    "no answer": ({"messages": ASKED[:1]}, "no question with an answer"),
    "empty answer": ({"conversations": turns("what?", " ")}, "answer 1 is empty"),
    "empty caption": ({"image": "a.png", "caption": None}, "caption is empty"),
    "placeholders": ({"image": "a.png", "conversations": turns("<image><image>", "a")}, "1 pictures but 2 '<image>' marks"),
    "placeholders, parts": ({"messages": messages([PART, TEXT])}, "0 pictures but 1 '<image>' marks"),
    "placeholders, answer": ({"conversations": turns("what?", "<image>")}, "answer 1 contains '<image>'"),
    "missing image": ({"image": 3, "caption": "x"}, "3 is no path of a picture"),
    "URL": ({"image": "https://x.org/a.png", "caption": "x"}, "is a URL; .* download the picture and put its path"),
    "box": ({"conversations": turns("where?", "<box>(0,0),(1200,5)</box>")}, r"\(1200,5\)' lies outside its picture"),
    "box, InternVL": ({"conversations": turns("where?", "<box>[[0, 9, 8]]</box>")}, "has 3 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_by_kind(name: str) -> None:
    record, reason = FAULTS[name]
    with pytest.raises(BadSample, match=reason) as raised:
        read_entry(record)
    assert kind_of(raised.value) == name.partition(",")[0]


@pytest.mark.parametrize("text", ["<box>(0,0),(1000,5)</box>", "a <box>[[1, 2, 3, 4], [0,0,9,9]]</box> b", "no box"])
def test_boxes_that_are_right(text: str) -> None:
    check_boxes(text)


@pytest.mark.parametrize(
    "text", ["<box>(9,0),(1,5)</box>", "<box>(-1,0),(1,5)</box>", "<box>(0,0),(1,5)", "(1,5)</box>", "<box></box>"]
)
def test_boxes_that_are_wrong(text: str) -> None:
    with pytest.raises(BadSample):
        check_boxes(text)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture of 30 x 20 px, a.png."""
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    return tmp_path


def test_a_folder_of_pictures_with_captions(folder: Path) -> None:
    (folder / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "deep" / "b.jpg")
    (folder / "a.txt").write_text("a cat\n")
    (folder / "deep" / "b.txt").write_text("ein Hund", encoding="utf-8")
    (folder / "c.txt").write_text("nothing")
    data = PairsFile(folder)
    assert [(data[place]["key"], data[place]["caption"]) for place in (0, 2)] == [("a.png", "a cat"), ("deep/b.jpg", "ein Hund")]
    with pytest.raises(ValueError, match=r"c\.txt: there is no picture of that name"):
        data[1]
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no picture with a text file .*\.jsonl"):
        PairsFile(folder / "empty")


def test_tables_with_quotes_and_several_lines(folder: Path) -> None:
    (folder / "a.csv").write_text('\ufeffimage,caption\na.png,"two\nlines, ""quoted"""\n\na.png,one,more\na.png,last\n', "utf-8")
    data = PairsFile(folder / "a.csv")
    assert [data[place]["caption"] for place in (0, 2)] == ['two\nlines, "quoted"', "last"]
    assert (data[0]["key"], data[2]["key"]) == ("a.csv:2", "a.csv:6")
    with pytest.raises(ValueError, match=r"a\.csv, line 5: not a record of 2 fields"):
        data[1]
    (folder / "a.tsv").write_text('image\tcaption\na.png\t"Hello," said the cat\n')
    assert PairsFile(folder / "a.tsv")[0]["caption"] == '"Hello," said the cat'


def test_parquet(folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    stream = io.BytesIO()
    Image.new("RGB", (6, 4)).save(stream, "PNG")
    rows = [
        {"id": n, "images": [{"bytes": stream.getvalue(), "path": None}], "messages": [dict(turn) for turn in ASKED]}
        for n in range(5)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    data = ChatsFile(folder / "a.parquet")
    assert len(data) == 5
    for place in (4, 0, 3):
        assert data[place]["images"][0].shape == (4, 6, 3)
        assert data[place]["key"] == f"a.parquet:{place + 1} (id {place})"
    assert len(list(open_records(folder / "a.parquet")[0].scan())) == 5
    (folder / "b.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"b\.parquet is no parquet file"):
        ChatsFile(folder / "b.parquet")


def test_several_files_and_a_part_that_is_held_out(folder: Path) -> None:
    for name in ("one", "two"):
        records = [{"id": f"{name}{n}", "image": "a.png", "caption": f"{name} {n}"} for n in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = [str(folder / "one.jsonl"), str(folder / "two.jsonl")]
    data = PairsFile(paths, validation=0.2)
    apart = data.held_out()
    captions, others = ({part[place]["caption"] for place in range(len(part))} for part in (data, apart))
    assert len(captions) + len(others) == 400
    assert not captions & others
    assert 50 < len(others) < 110
    again = PairsFile(paths[:1], validation=0.2).held_out()  # a record stays on its side whatever else there is
    assert {again[place]["caption"] for place in range(len(again))} == {text for text in others if text.startswith("one")}
    assert len(PairsFile(paths, length=250)) == 250
    assert PairsFile(paths, length=250)[249]["caption"] == "two 49"
    assert len(PairsFile(paths[0], validation=paths[1]).held_out()) == 200
    assert PairsFile(paths).held_out() is None
    with pytest.raises(ValueError, match=r"data\.validation=1\.5 must be a share"):
        PairsFile(paths, validation=1.5)


def test_every_byte_of_a_file_belongs_to_a_record_or_none(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(b'\xef\xbb\xbf\n{"n": 0}\n\n{"n": 1}\nno\n{"n": 3}')
    joined = JoinedRecords(open_records(folder / "a.jsonl"))
    assert [joined.read(place)[1:] for place in (0, 1, 3)] == [({"n": 0}, 2), ({"n": 1}, 4), ({"n": 3}, 6)]
    with pytest.raises(BadSample, match=r"a\.jsonl, line 5: not a record"):
        joined.read(2)
    scanned = [(found.line, found.record) for found in open_records(folder / "a.jsonl")[0].scan()]
    assert scanned == [(2, {"n": 0}), (4, {"n": 1}), (5, None), (6, {"n": 3})]


def test_a_conversation_is_no_pair_but_no_fault_either(folder: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns("what?", "a cat")}))
    with pytest.raises(Unwanted, match=r"a\.jsonl, line 1: it is a conversation"):
        PairsFile(folder / "a.jsonl")[0]


def test_a_picture_of_200_megapixels_is_refused_by_its_header(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT")]
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    (folder / "a.jsonl").write_text(json.dumps({"image": "huge.png", "caption": "x"}))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(BadSample, match=r"line 1: image .*huge\.png .*larger|20000 x 10000 px") as raised:
        PairsFile(folder / "a.jsonl")[0]
    assert kind_of(raised.value) == "large image"


@pytest.mark.parametrize(("records", "share"), [(1, 0.1), (2, 0.01), (8, 0.001), (8, 0.999)])
def test_a_small_file_keeps_a_record_to_train_on_and_one_to_measure_on(records: int, share: float, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"image": "a.png", "caption": f"{number}"}) + "\n" for number in range(records)))
    data = PairsFile(path, validation=share)
    counts = len(data), len(data.held_out())
    assert sum(counts) == records
    assert counts == ((1, 0) if records == 1 else (1, 7) if share > 0.9 else (records - 1, 1))
    path.write_text("".join(json.dumps({"image": "a.png", "caption": "same"}) + "\n" for _ in range(records)))
    assert len(PairsFile(path, validation=share)) == records  # equal records stay on one side
