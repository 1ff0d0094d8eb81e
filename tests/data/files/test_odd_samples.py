"""Folders and videos of which one of twenty is odd: all batches come, and the ledger has its name, its file and what is wrong."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import Dataset

from lightning_internvl.data.files.datasets import ChatsFile
from lightning_internvl.data.files.labelled_folder import FolderLabels
from lightning_internvl.data.module import StageData

COUNT, SIZE, BATCHES = 20, 4, 15  # three epochs


def huge(path: Path) -> None:
    """A picture of 60,000 x 60,000 pixels, as its header says."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    Image.new("RGB", (1, 1)).save(path, "PNG")
    whole = path.read_bytes()
    path.write_bytes(whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:])


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def pipe(path: Path) -> None:
    """Of which reading never ends."""
    path.unlink()
    os.mkfifo(path)


def gone(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere.png")


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda path: path.write_bytes(b"<html>"), "it is a web page, not a picture"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "cut": (cut, "cannot be read"),
    "huge": (huge, "px"),
    "pipe": (pipe, "it is no file, but a pipe or a device"),
    "gone": (gone, "does not exist"),
}


class Collate:
    def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {"key": sample["key"]}

    def stack(self, prepared: list[dict[str, Any]]) -> dict[str, Any]:
        return {"keys": [one["key"] for one in prepared]}


def skipped_of(data: Dataset[Any], folder: Path) -> dict[str, str]:
    """Why each sample was skipped that was, by its name; all batches are whole."""
    stage = StageData(
        data, Collate(), batch_size=SIZE, batches=BATCHES, start_batch=0, num_workers=0, max_bad_fraction=0.1, folder=folder,
        endless=False, max_sample_seconds=20,
    )  # fmt: skip
    stage.trainer = SimpleNamespace(world_size=1, global_rank=0)
    batches = [stage.on_before_batch_transfer(batch, 0) for batch in stage.train_dataloader()]
    assert [len(batch["keys"]) for batch in batches] == [SIZE] * BATCHES
    rows = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert len(rows) >= BATCHES * SIZE // COUNT
    return {row["key"]: row["reason"] for row in rows}


@pytest.mark.parametrize("kind", ODD)
def test_one_picture_of_a_folder(kind: str, tmp_path: Path) -> None:
    for number in range(COUNT):
        path = tmp_path / "pictures" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((12, 12), 50).convert("RGB").save(path)
    spoil, told = ODD[kind]
    spoil(tmp_path / "pictures/1/7.png")
    ((key, reason),) = skipped_of(FolderLabels(tmp_path / "pictures"), tmp_path).items()
    assert key == "1/7.png"
    assert reason.startswith(f"image {tmp_path}/pictures/1/7.png ")
    assert told in reason


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "gone"])
def test_one_video(kind: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what changes?"}, {"from": "gpt", "value": "the colour"}]
    for number in range(COUNT):
        first, second = (Image.effect_noise((12, 12), 50) for _ in range(2))
        first.save(tmp_path / f"{number}.gif", save_all=True, append_images=[second], duration=500)
    records = [{"id": f"clip {number}", "video": f"{number}.gif", "conversations": turns} for number in range(COUNT)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ODD[kind][0](tmp_path / "7.gif")
    ((key, reason),) = skipped_of(ChatsFile(tmp_path / "chats.jsonl"), tmp_path).items()
    assert key == "chats.jsonl:8 (id clip 7)"
    assert reason.startswith(f"{tmp_path}/chats.jsonl, line 8 (id clip 7): ")
    assert f"{tmp_path}/7.gif" in reason
