"""What becomes of the records of shards."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.config.stream_checks import stream_faults
from lightning_internvl.data.bad_samples import BadSample, Ledger, Skipped, Unwanted
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.packed import grouping_of
from lightning_internvl.data.module import StageData
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.shards.datasets import ShardChats, ShardDataset, ShardPairs
from lightning_internvl.data.shards.sources import open_shards
from lightning_internvl.data.shards.tables import ParquetShards
from lightning_internvl.data.shards.tar import TarWriter
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.report.read import RunFiles, StageFiles
from lightning_internvl.report.skipped import skipped_samples


def jpeg(width: int = 40, height: int = 30) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def samples(kind: type[ShardDataset], folder: Path, *records: dict[str, Any], **settings: Any) -> list[Any]:
    """What a shard's records give: samples, or faults."""
    with TarWriter(folder / "0.tar") as tar:
        for number, record in enumerate(records):
            tar.write({"key": str(number), **record})
    data = kind(folder / "0.tar", **settings)
    found = []
    for record in data.sources["shards"].read(0):
        try:
            found.append(data.sample(record, {"language": "zh"}))
        except BadSample as error:
            found.append(error)
    return found


def test_pairs(tmp_path: Path) -> None:
    plain, said, html, long = samples(
        ShardPairs,
        tmp_path,
        {"jpg": jpeg(), "txt": "a cat"},
        {"png": jpeg(), "json": {"caption": "a dog", "language": "en"}},
        {"jpg": b"<html>not found", "txt": "a cat"},
        {"jpg": jpeg(), "txt": "x" * 2**20},
    )
    assert plain["image"].shape == (30, 40, 3)
    assert (plain["caption"], plain["language"], said["caption"], said["language"]) == ("a cat", "zh", "a dog", "en")
    assert (html.kind, long.kind) == ("unreadable image", "long caption")


def test_large_jpegs_are_decoded_small_where_that_is_asked_for(tmp_path: Path) -> None:
    (found,) = samples(ShardPairs, tmp_path, {"jpg": jpeg(640, 480), "txt": "a cat"}, decode_at=200)
    assert found["image"].shape == (240, 320, 3)


def test_chats(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]
    two, bare, caption, named, video = samples(
        ShardChats,
        tmp_path,
        {"0.jpg": jpeg(8, 8), "1.jpg": jpeg(16, 8), "json": {"conversations": talk}},
        {"json": {"conversations": talk}},
        {"jpg": jpeg(), "txt": "a cat"},
        {"json": {"conversations": talk, "image": "elsewhere.jpg"}},
        {"json": {"conversations": talk, "video": "film.mp4"}},
        caption_request="Say it.",
    )
    assert [image.shape for image in two["images"]] == [(8, 8, 3), (8, 16, 3)]
    assert two["conversation"][0]["content"] == "<image>\n<image>\nwhat?"
    assert bare == {
        "images": [],
        "conversation": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}],
        "unread": [],
    }
    assert [message["content"] for message in caption["conversation"]] == ["<image>\nSay it.", "a cat"]
    assert "names the picture elsewhere.jpg and does not hold it" in str(named)
    assert isinstance(video, Unwanted)


def test_records_of_shards_have_all_formats_of_files(tmp_path: Path) -> None:
    texts = {"images": [{"bytes": jpeg()}], "texts": [{"user": "what?", "assistant": "a cat"}], "messages": None, "hint": "b"}
    asked, photo = samples(
        ShardChats,
        tmp_path,
        {"jpg": jpeg(), "json": {"question": "what?", "answer": "a cat", "choices": ["a cat", "a dog"]}},
        {"jpg": jpeg(), "json": {"conversations": [{"from": "human", "value": "<image1>"}, {"from": "gpt", "value": "<see>"}]}},
    )
    found = [asked, photo, ShardChats(tmp_path / "0.tar").sample({"key": "0", **texts}, {})]
    said = [("<image>\nwhat?", "a cat"), ("<image>", "<see>"), ("<image>\nwhat?", "a cat")]
    assert [tuple(message["content"] for message in one["conversation"]) for one in found] == said
    assert [one["unread"] for one in found] == [["key 'choices'"], [], ["key 'hint'"]]
    named = {"key": "0", "photo": jpeg(), "jpg": jpeg(), "question": "what?", "answer": "a cat"}
    assert ShardChats(tmp_path / "0.tar", image="photo").sample(named, {})["unread"] == []


@pytest.mark.parametrize("packing", [None, "bucketed"])
def test_what_is_not_read_of_a_stream_is_told_and_refused_while_it_trains(
    packing: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]}
    with TarWriter(tmp_path / "0.tar") as tar:
        for number in range(40):
            tar.write({"key": str(number), "json": {**talk, **({"hint": "b"} if number % 4 == 0 else {})}})
    collate = ChatCollator(toy_tokenizer(), load_template("chatml"), Squash(8), 1, 60)

    def trained(limit: float) -> int:
        """How many batches of 8 are trained on."""
        grouping = grouping_of(packing, collate, 8, 4)
        data = StageData(
            ShardChats(tmp_path / "0.tar", lanes=1, turns=1),
            collate,
            batch_size=8,
            batches=20,
            max_unread_fraction=limit,
            grouping=grouping,
        )
        data.trainer = SimpleNamespace(world_size=1, global_rank=0)
        count = 0
        for batch in data.train_dataloader():
            assert "unread" not in data.on_before_batch_transfer(batch, 0)
            count += 1
        return count

    assert trained(0.3) == 20
    assert re.search(r"2\d of 104 records hold something that is not read: key 'hint'", capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"2\d of 104 records hold .*key 'hint' .*; more than data.max_unread_fraction=0.2"):
        trained(0.2)


def test_parquet_files_are_shards_too(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"jpg": [jpeg()], "caption": ["a cat"]}), tmp_path / "0.parquet")
    shards = open_shards(f"{tmp_path}/{{0..0}}.parquet")
    assert isinstance(shards, ParquetShards)
    data = ShardPairs(sources={"a": {"shards": shards}})
    assert data.sample(next(shards.read(0)), {})["caption"] == "a cat"
    settings = {
        "lanes": 1,
        "turns": 1,
        "shuffle": 1,
        "run": 1,
        "num_workers": 0,
        "sources": {"a": f"{tmp_path}/{{0..2}}.parquet"},
    }
    (fault,) = stream_faults(settings, 1, look=True)
    assert fault == f"data.sources.a.shards: 2 of 3 shards do not exist: {tmp_path}/1.parquet, {tmp_path}/2.parquet"


def test_what_was_skipped_is_counted_by_source_and_told_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "contrastive"
    settings = {"max_bad_fraction": 1.0, "start": 0, "batch_size": 8, "epoch": None}
    ledger = Ledger(folder / "skipped.jsonl", **settings)
    assert ledger.note() == ""
    ledger.add([Skipped(3, "s/1", "empty caption", "s/1: <none>", source=name) for name in ("a", "a", "b")])
    assert ledger.note() == "skipped 3 (a 2, b 1)"
    assert "3 of 11 samples were skipped (empty caption: 3; of a: 2, b: 1)" in ledger.summary()
    resumed = Ledger(folder / "skipped.jsonl", **{**settings, "start": 1})
    assert resumed.note() == ledger.note()
    with (folder / "skipped.1.jsonl").open("w") as file:
        file.write('{"kind": "empty')
    page = skipped_samples(RunFiles(str(tmp_path), "", [StageFiles("contrastive"), StageFiles("generative")], "", {}, []))
    row = '<th scope="row">empty caption</th><td>a</td><td>2</td><td class="why">s/1: &lt;none&gt;</td>'
    assert row in page
    assert page.count("rowgroup") == 1
    assert skipped_samples(RunFiles(str(tmp_path), "", [StageFiles("generative")], "", {}, [])) == ""
