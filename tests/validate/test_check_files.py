"""`data.validate=true`: every fault of a file by line and name, what it holds, in how much time, and without decoding a pixel."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from published_records import READ
from runs import TINY, Outcome, train

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.collate.packed import PackedChats
from lightning_internvl.data.files.datasets import ChatsFile
from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.processors.basic import Tiles
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.validate.check_files import CheckedSource, Fault, FileCheck
from lightning_internvl.validate.command import histogram


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    """A record with a picture and question and answer in turn."""
    said = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"image": "a.png", "conversations": said, **more}


GOOD = chat("<image>\nwhat?", "a cat", id="good")
TURNS = [{"role": role, "content": "a"} for role in ("user", "user", "assistant")]
BAD: dict[str, tuple[Any, str]] = {
    "broken line": ('{"image": "a.png"', r"line 2: not a record"),
    "missing image": (chat("what?", "x", image="none.png", id="n"), r"line 3 \(id n\): image .*none\.png does not exist"),
    "unreadable image": (chat("what?", "x", image="text.png"), r"line 4: image .*text\.png cannot be read"),
    "large image": (chat("what?", "x", image="huge.png"), r"line 5: image .*huge\.png is larger"),
    "placeholders": (chat("<image><image>", "x"), "line 6: 1 pictures but 2"),
    "empty answer": (chat("what?", ""), r"line 7: answer 1 is empty"),
    "unknown role": ({"conversations": [{"from": "robot", "value": "x"}]}, "line 8: role 'robot' is unknown"),
    "no answer": (chat("what?"), "line 9: the conversation has no question with an answer"),
    "refused": ({"messages": TURNS}, r"line 10: sample of the record: message 1 has role 'user', expected 'assistant'"),
    "box": (chat("where?", "<box>(0,0),(1001,5)</box>"), r"line 11: the box '\(0,0\),\(1001,5\)' lies outside its picture"),
    "too long": (chat("what? " * 60, "x"), r"line 12: .*its first turn does not fit within max_length=100"),
    "URL": (chat("what?", "x", image="https://x.org/a.png"), "line 13: .* is a URL"),
    "video": ({"video": "none.gif", "messages": TURNS[1:]}, r"line 14: .*none\.gif: there is no such video"),
    "unknown format": ({"foo": 1}, "line 15: neither a conversation"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures, good and bad."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    for name, size in (("a.png", (30, 20)), ("huge.png", (200, 200))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.gif")
    return tmp_path


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def collator(max_length: int = 100, videos: bool = True, **options: Any) -> ChatCollator:
    """Pictures of 4 tokens and videos as Qwen2-VL reads them, beside the text of ChatML."""
    tokenizer = toy_tokenizer(["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<video>"])
    names = ImageTokens(video="<video>" if videos else None)
    processor = AnyResolution(112, min_pixels=56**2, min_frames=1, frame_pixels=(56**2, 56**2))
    return ChatCollator(tokenizer, load_template("chatml"), processor, 4, max_length, names, **options)


def check(path: Path, **options: Any) -> tuple[FileCheck, list[Fault]]:
    found = FileCheck(chats={"supervised": collator(**options)})
    return found, list(found.faults([CheckedSource(path)]))


def test_every_fault_is_named_with_line_and_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    path = write(folder / "chats.jsonl", [GOOD, *(record for record, _ in BAD.values())])
    checked, faults = check(path)
    assert [fault.kind for fault in faults] == list(BAD)
    assert [fault.line for fault in faults] == list(range(2, 2 + len(BAD)))
    for fault, (_, reason) in zip(faults, BAD.values(), strict=True):
        name = f" (id {fault.id})" if fault.id else ""
        assert re.search(reason, f"line {fault.line}{name}: {fault.reason}"), fault
        assert fault.bad
    assert checked.statistics.records == 1 + len(BAD)


def test_what_is_worth_knowing_but_no_fault(folder: Path) -> None:
    long = chat("what?", "x", "what? " * 100, "x", hint="no")
    still = {"video": "one.gif", "messages": TURNS[1:]}
    path = write(folder / "chats.jsonl", [long, still])
    found = [(fault.kind, fault.bad) for fault in check(path)[1]]
    assert found == [("note: not read", False), ("note: cut", False), ("note: video of one frame", False)]
    assert [fault.kind for fault in check(path, too_long="skip")[1]][1:2] == ["left out: too long"]
    fault = check(path, videos=False)[1][-1]
    assert (fault.line, fault.bad) == (2, True)
    assert "it has videos, for which this recipe has no token" in fault.reason


def test_a_list_that_breaks_off_is_checked_up_to_there(folder: Path) -> None:
    (folder / "chats.json").write_text(f"[{json.dumps(GOOD)},\n{json.dumps(GOOD)},\n{{]")
    checked, faults = check(folder / "chats.json")
    assert [(fault.kind, fault.line) for fault in faults] == [("broken list", 3)]
    assert checked.statistics.formats == {"conversations": 2}


def test_lengths_are_shown_by_powers_of_two() -> None:
    lines = histogram([3, 4, 9]).splitlines()
    assert [int(line.split()[2]) for line in lines] == [4, 8, 16]
    assert [int(line.split()[-1]) for line in lines] == [2, 0, 1]


def test_ten_thousand_lines_take_a_tenth_of_the_time_allowed(folder: Path) -> None:
    """A hundred thousand lines may take 20 s; measured in time of the processor, on pictures of which each is another file."""
    content = (folder / "a.png").read_bytes()
    for number in range(1000):
        (folder / f"{number}.png").write_bytes(content)
    texts = ("<image>\nwhat is in the picture, and where?", "a cat on a box " * 5, "how many?", "two")
    path = write(folder / "many.jsonl", [chat(*texts, image=f"{n % 1000}.png", id=n) for n in range(10_000)])
    begun = time.process_time()
    checked, faults = check(path, max_length=600)
    assert not faults
    assert checked.statistics.records == 10_000
    assert time.process_time() - begun < 2 + 1.5  # of which the tokens of the first thousand do not grow with the file


# Records that are used or not by the size of their pictures, the length of their text, and marks; and whether training uses them
BOTH_WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "two pictures that fit": (chat("<image><image>x", "y", image=["a.png"] * 2), True),
    "many pictures that do not": (chat("<image>" * 30, "y", image=["a.png"] * 30), False),
    "pictures that fit by their size": (chat("x", "y", image=["small.png"] * 12), True),
    "the same, larger": (chat("x", "y", image=["large.png"] * 12), False),
    "a strip": (chat("x", "y", image="strip.png"), False),
    "a picture that is turned": (chat("x", "y", image="turned.jpg"), True),
    "a long answer beside a small picture": (chat("x", " cat" * 40, image="small.png"), True),
    "a longer one": (chat("x", " cat" * 400, image="small.png"), False),
    "later turns that are left out": (chat("x", "y", "x" * 300, "y"), True),
    "a picture in turns that are left out": (chat("x", "y" * 60, "<image>" + "x" * 300, "y"), False),
    "a Chinese text of many bytes": (chat("x", "字" * 15), True),
    "typed tokens": (chat("<img><IMG_CONTEXT></img>x", "y"), True),
    "typed tokens in an answer": (chat("x", "<IMG_CONTEXT>"), False),
    "an answer without weight": ({"messages": [*TURNS[1:], {"role": "user", "content": "a"}, {**TURNS[2], "weight": 0}]}, True),
    "a learnt answer that does not fit": (
        {"messages": [TURNS[0], {**TURNS[2], "loss": False}, TURNS[0], {**TURNS[2], "content": "y" * 200}]}, False,
    ),
    "two questions in a row": ({"messages": TURNS}, False),
    "a picture that is cut off": (chat("x", "y", image="cut.png"), False),
    "a JPEG that is cut off": (chat("x", "y", image="cut.jpg"), False),
    "base64": (chat("x", "y", image="SMALL"), True),
    "a caption": ({"image": "a.png", "caption": "x"}, True),
    "a video without pixels of its own": ({"video": "none.gif", "messages": TURNS[1:]}, False),
    "a video": ({"video": "one.gif", "messages": TURNS[1:]}, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["padded", "packed", "tiles"])
def test_the_check_says_what_training_does(kind: str, tmp_path: Path) -> None:
    """Every record of all kinds of faults, both ways, and the good ones."""
    for name, size in (("a.png", (30, 20)), ("small.png", (10, 10)), ("large.png", (900, 800)), ("strip.png", (2, 500))):
        Image.new("RGB", size).save(tmp_path / name)
    noise = np.random.default_rng(0).integers(0, 255, (90, 60, 3), dtype=np.uint8)
    _turned(noise, tmp_path)
    for suffix in ("png", "jpg"):
        Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
        (tmp_path / f"cut.{suffix}").write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:-900])
    Image.new("RGB", (8, 8)).save(tmp_path / "one.gif")
    (tmp_path / "text.png").write_text("no picture")
    coded = base64.b64encode((tmp_path / "small.png").read_bytes()).decode()
    records = [GOOD, *(record for record, _ in BAD.values()), *(record for record, _ in BOTH_WAYS.values())]
    records = [json.loads(json.dumps(one).replace("SMALL", coded)) if isinstance(one, dict) else one for one in records]
    path, collate = write(tmp_path / "all.jsonl", records), collator()
    if kind == "packed":
        tokenizer, template, names = collate.tokenizer, collate.template, collate.image_tokens
        collate = PackedChats(tokenizer, template, collate.processor, 4, 100, names, row_tiles=8)
    if kind == "tiles":
        collate = ChatCollator(collate.tokenizer, collate.template, Tiles(16, max_tiles=12), 4, 100, collate.image_tokens)
    used = _agreeing(path, collate)
    if kind == "padded":
        assert used[1 + len(BAD) :] == [expected for _, expected in BOTH_WAYS.values()]


def _agreeing(path: Path, collate: ChatCollator) -> list[bool]:
    """Which records training uses, of which the check says the same."""
    data, used = ChatsFile(path), []
    for place in range(len(data)):
        try:
            collate.prepare({**data[place], "draw": (0, place)})
            used.append(True)
        except ValueError:
            used.append(False)
    bad = {fault.line for fault in FileCheck(chats={"sft": collate}).faults([CheckedSource(path)]) if fault.bad}
    assert [line not in bad for line in range(1, len(used) + 1)] == used
    return used


def test_the_check_and_training_use_every_spelling_of_every_format(tmp_path: Path) -> None:
    """And neither uses it with a picture or video that is not there; bytes stand in no list of JSON."""
    records = {name: record for name, (record, *_) in READ.items() if name != "bytes and a name"}
    for record in records.values():
        for name in re.findall(r"[\w/]+\.(?:png|jpg)", json.dumps(record).replace("\\\\", "/")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)
    collate = collator(max_length=400)
    path = write(tmp_path / "all.jsonl", list(records.values()))
    assert dict(zip(records, _agreeing(path, collate), strict=True)) == dict.fromkeys(records, True)
    (tmp_path / "elsewhere").mkdir()
    moved = write(tmp_path / "elsewhere" / "all.jsonl", list(records.values()))
    with_files = {
        name for name, (_, _, *given) in READ.items() if any(not isinstance(one, bytes) for some in given for one in some)
    }
    assert dict(zip(records, _agreeing(moved, collate), strict=True)) == {name: name not in with_files for name in records}


def _turned(noise: np.ndarray, folder: Path) -> None:
    """A picture that its tag turns by a quarter."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise).save(folder / "turned.jpg", exif=exif)


# --- the command ----------------------------------------------------------------------------------------------------


def validated(folder: Path, *overrides: str) -> Outcome:
    words = ("data=conversations", "data.validate=true", f"paths.run={folder}/run", *overrides)
    return train(*TINY, *words)


def test_the_command_tells_and_exits_with_1(folder: Path) -> None:
    path = write(folder / "chats.jsonl", [GOOD, *(record for record, _ in BAD.values())])
    outcome = validated(folder, f"data.path={path}", "pipeline=[supervised]", "data.chats_collate.max_length=100")
    assert outcome.code == 1, outcome.err
    assert f"{path}, line 3 (id n): image {folder}/none.png does not exist" in outcome.out
    assert re.search(r"missing image\s+│ 1\b", outcome.out)
    assert "15 records read" in outcome.out
    assert "14 bad (93.33%)" in outcome.out
    written = [json.loads(line) for line in (folder / "run" / "faults.jsonl").read_text().splitlines()]
    assert [row["line"] for row in written] == list(range(2, 16))
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["faults.jsonl", "preview-supervised.html"]


def test_good_data_and_a_preview_of_every_stage(folder: Path) -> None:
    pairs = write(folder / "pairs.jsonl", [{"image": "a.png", "caption": f"a <b> {n}"} for n in range(3)])
    chats = write(folder / "chats.jsonl", [GOOD, chat("<image>\nwho?", "me & you")])
    outcome = validated(folder, f"data.pairs_path={pairs}", f"data.chats_path={chats}")
    assert outcome.code == 0, outcome.err
    assert "5 records read" in outcome.out
    assert "0 bad" in outcome.out
    page = (folder / "run" / "preview-supervised.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert re.search(r"\[\d+ visual tokens\]</i>.*who\?.*<mark>me &amp; you", page, re.DOTALL)
    page = (folder / "run" / "preview-contrastive.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "a &lt;b&gt; 2" in page
    assert not (folder / "run" / "faults.jsonl").exists()
    assert not (folder / "run" / "config.yaml").exists()


def test_a_file_must_be_given(folder: Path) -> None:
    outcome = validated(folder)
    assert outcome.code == 2
    assert "is given; give data.path=FILE or" in outcome.err
    assert not (folder / "run").exists()
    outcome = train("data.validate=true")
    assert "there is no setting 'data.validate'" in outcome.err
    outcome = train("+data.validate=true", f"paths.run={folder}/run")
    assert "no stage of the pipeline reads a file; give data=conversations" in outcome.err
    outcome = validated(folder, "data.max_bad_fraction=2")
    assert "data.max_bad_fraction=2 must be a number from 0 to 1" in outcome.err
