"""Batches chosen from waiting samples: the same for any number of data processes and after a resume, with every sample once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.collate.base import Prepared
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.packed import LengthBuckets, PackedChats, PackedRows
from lightning_internvl.data.module import StageData
from lightning_internvl.data.order.sampler import POSITION
from lightning_internvl.data.packed_stream import dealt_positions
from lightning_internvl.data.processors.basic import Tiles
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer

LENGTH, BATCHES, ROWS = 60, 14, 2
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
TOKENIZER = toy_tokenizer()
WIDTH, HEIGHT = 8, 4  # a tile has four tokens


class Talks(Dataset[dict[str, Any]]):
    """Sixty conversations of all lengths with none, one or two pictures; every eleventh cannot be read."""

    def __init__(self, bad: bool = True) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, place: int) -> dict[str, Any]:
        if self.bad and place % 11 == 5:
            raise BadSample(f"talks, line {place + 1}: nothing")
        rng = np.random.default_rng(place)
        shapes = [(HEIGHT, WIDTH * int(rng.integers(1, 4)), 3) for _ in range(place % 3)]
        images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        words = [" ".join(rng.choice(["red", "blue", "green"], int(np.exp(rng.normal(1.5, 0.8)) + 1))) for _ in range(2)]
        question = "<image>" * len(images) + words[0]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": words[1]}]
        return {"images": images, "conversation": turns, "key": str(place)}


def collator(kind: type[ChatCollator] = PackedChats, **options: Any) -> Any:
    return kind(TOKENIZER, load_template("chatml", ""), Tiles(4, max_tiles=2, thumbnail=False), 4, 128, **options)


def stage(
    folder: Path, kind: str = "packed", workers: int = 0, start: int = 0, rank: int = 0, world: int = 1, **options: Any
) -> Any:
    chats = collator(row_tiles=4) if kind == "packed" else collator(ChatCollator)
    grouping = PackedRows(chats, ROWS, window=3) if kind == "packed" else LengthBuckets(chats, 3, window=3)
    settings = {"batches": BATCHES, "endless": False, "max_bad_fraction": 1.0, "seed": 3, **options}
    found = StageData(
        settings.pop("data", Talks()), chats, batch_size=ROWS, start_batch=start, num_workers=workers, folder=folder,
        grouping=grouping, **settings,
    )  # fmt: skip
    found.trainer = SimpleNamespace(world_size=world, global_rank=rank)
    return found


def read(data: StageData, batches: int = BATCHES) -> list[dict[str, Any]]:
    """So many batches, as the trainer takes them."""
    found = iter(data.train_dataloader())
    return [data.on_before_batch_transfer(next(found), 0) for _ in range(batches)]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, list) and one and isinstance(one[0], dict):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    return one.equal(two) if isinstance(one, Tensor) else one == two


@pytest.mark.parametrize("kind", ["packed", "bucketed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stage_that_goes_on_reads_and_counts_the_same(kind: str, workers: int, tmp_path: Path) -> None:
    whole = stage(tmp_path / "whole", kind)
    expected = read(whole)
    killed = stage(tmp_path / "parts", kind, workers)
    loader = iter(killed.train_dataloader())
    for _ in range(5):
        killed.on_before_batch_transfer(next(loader), 0)
    saved = killed.state_dict()  # with the checkpoint; two further batches are read before the kill
    for _ in range(2):
        killed.on_before_batch_transfer(next(loader), 0)
    resumed = stage(tmp_path / "parts", kind, workers, start=5)
    resumed.load_state_dict(torch.load(_kept(saved, tmp_path), weights_only=True))
    assert same(read(resumed, BATCHES - 5), expected[5:])
    files = [(folder / "skipped.jsonl").read_text() for folder in (tmp_path / "whole", tmp_path / "parts")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) > 3
    assert (resumed.ledger.tried, resumed.ledger.kinds) == (whole.ledger.tried, whole.ledger.kinds)
    assert whole.ledger.tried == whole.position["chunk"] * 8 + len(files[0].splitlines())
    assert resumed.position == whole.position


def _kept(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_a_position_is_small_and_a_stage_without_one_says_so(tmp_path: Path) -> None:
    data = stage(tmp_path)
    assert data.state_dict() == {}
    read(data, 3)
    (position,) = data.state_dict()["positions"]
    assert 0 < len(position["waiting"]) < LENGTH
    with pytest.raises(ValueError, match="does not say where its packed data stood"):
        stage(tmp_path, start=3).train_dataloader()


def test_rows_hold_the_budgets_and_every_sample_comes_once_an_epoch(tmp_path: Path) -> None:
    data = stage(tmp_path, data=Talks(bad=False), batches=20)
    batches = read(data, 20)
    for batch in batches:
        assert [sum(row) for row in batch["segments"]] == batch["attention_mask"].sum(dim=1).tolist()
        assert all(sum(row) <= 128 for row in batch["segments"])
        places = batch["input_ids"] == TOKENIZER.convert_tokens_to_ids("<IMG_CONTEXT>")
        assert places.sum() == 4 * len(batch["pixel_values"])
        assert places.sum(dim=1).max() <= 4 * 4
        assert len(batch["keys"]) == len(batch["image_counts"]) == sum(map(len, batch["segments"]))
    keys = [key for batch in batches for key in batch["keys"]]
    assert len(keys) > LENGTH
    position = data.position
    drawn = [*keys, *(str(data._sampler(8, 1, 0, LENGTH).indices([place])[0]) for place in position["waiting"])]
    counts = np.bincount(np.array(drawn, dtype=int), minlength=LENGTH)
    assert counts.max() - counts.min() <= 1


def test_batches_of_one_length_have_less_padding_than_the_next_that_come(tmp_path: Path) -> None:
    def padding(batches: list[dict[str, Any]]) -> float:
        return 1 - float(sum(b["attention_mask"].sum() for b in batches)) / sum(b["attention_mask"].numel() for b in batches)

    bucketed = read(stage(tmp_path, "bucketed"))
    assert all(len(batch["keys"]) == 3 and "segments" not in batch for batch in bucketed)
    plain = StageData(
        Talks(), collator(ChatCollator), batch_size=3, batches=BATCHES, endless=False, max_bad_fraction=1.0, folder=tmp_path
    )
    plain.trainer = SimpleNamespace(world_size=1, global_rank=0)
    assert padding(bucketed) < 0.6 * padding(read(plain))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_another_number_of_processes_loses_and_repeats_no_sample(world: int, tmp_path: Path) -> None:
    data = {"data": Talks(bad=False), "endless": True}
    before = [stage(tmp_path, rank=rank, world=2, **data) for rank in range(2)]
    seen = [key for one, batches in zip(before, (3, 9), strict=True) for batch in read(one, batches) for key in batch["keys"]]
    positions = dealt_positions([one.position for one in before], world)
    assert len(positions) == world
    places = [place for position in positions for place in position["waiting"]]
    front = {position["chunk"] for position in positions}
    assert len(front) == 1
    assert sorted(map(int, [*seen, *map(str, places)])) == list(range(front.pop() * world * 8))
    assert dealt_positions(positions, world) == positions


def test_processes_read_different_samples(tmp_path: Path) -> None:
    keys = [{key for batch in read(stage(tmp_path, rank=rank, world=2), 2) for key in batch["keys"]} for rank in (0, 1)]
    assert not keys[0] & keys[1]


# --- the collator -----------------------------------------------------------------------------------------------------


def prepared(chats: ChatCollator, *places: int) -> list[Prepared]:
    return [chats.prepare(Talks(bad=False)[place]) for place in places]


def test_a_packed_batch_is_its_samples_one_after_the_other() -> None:
    chats = collator()
    samples = prepared(chats, 0, 1, 2, 3, 7)
    packed, padded = chats.pack([samples[:2], samples[2:]]), chats.stack(samples)
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    assert packed["segments"] == [lengths[:2], lengths[2:]]
    for name in ("input_ids", "labels"):
        rows = torch.cat([row[:length] for row, length in zip(padded[name], lengths, strict=True)])
        assert torch.cat([row[: sum(s)] for row, s in zip(packed[name], packed["segments"], strict=True)]).equal(rows)
    assert (packed["labels"][packed["attention_mask"] == 0] == -100).all()
    for name in ("pixel_values", "image_counts"):
        assert packed[name].equal(padded[name])
    assert packed["keys"] == padded["keys"]


def test_the_first_token_of_a_sample_is_never_learnt() -> None:
    chats = collator()
    one, two = prepared(chats, 0, 3)
    learnt = {**two, "row": (two["row"][0], two["row"][0])}
    labels = chats.pack([[one, learnt]])["labels"][0]
    assert labels[len(one["row"][0])] == -100
    assert labels[len(one["row"][0]) + 1 :].tolist() == two["row"][0][1:]


def test_rows_without_a_picture() -> None:
    chats = collator()
    batch = chats.pack([prepared(chats, 0, 3), prepared(chats, 6)])
    assert batch["pixel_values"].shape == (0, 3, 4, 4)
    assert batch["image_counts"].tolist() == [0, 0, 0]


def test_too_many_tiles_are_the_samples_fault() -> None:
    chats = collator(row_tiles=2)
    assert chats.prepare(Talks()[1])["key"] == "1"
    two = Talks()[8]
    assert chats.prepare(two)["key"] == "8"  # two pictures share the limit of one
    three = {
        "images": [*two["images"], two["images"][0]],
        "conversation": [dict(turn) for turn in two["conversation"]],
        "key": "8",
    }
    three["conversation"][0]["content"] = "<image>" + three["conversation"][0]["content"]
    with pytest.raises(BadSample, match=r"sample 8: its pictures have 3 tiles, more than data\.packing_tiles=2"):
        chats.prepare(three)


def test_rows_that_could_not_hold_one_sample_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.packing_tokens=100 is less than the 128 tokens that one conversation may have"):
        collator(row_tokens=100)
    with pytest.raises(ValueError, match=r"data\.packing_tiles=1 is less than the 2 tiles that one picture may have"):
        collator(row_tiles=1)


def test_the_largest_batch_is_a_full_row() -> None:
    blank = collator(row_tokens=200, row_tiles=7).blank(2, "meta")
    assert blank["input_ids"].shape == (2, 200)
    assert blank["pixel_values"].shape == (14, 3, 4, 4)
    assert collator(row_tokens=200).blank(1, "meta")["pixel_values"].shape[0] == 49


def test_a_batch_says_where_the_data_goes_on(tmp_path: Path) -> None:
    data = stage(tmp_path)
    batch = next(iter(data.train_dataloader()))
    assert set(batch[POSITION]) == {"chunk", "waiting"}
    assert POSITION not in data.on_before_batch_transfer(batch, 0)
