"""Samples of shards: every one once an epoch, in an order that depends on the seed alone, and goes on after a kill as if it had
not been stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.module import StageData
from lightning_internvl.data.shards.cursor import KEPT_OPEN, OpenShards, ReaderLayout, ShardCursor
from lightning_internvl.data.shards.datasets import ShardDataset
from lightning_internvl.data.shards.stream import ShardStream
from lightning_internvl.data.shards.tar import Record, ShardError, Shards, TarShards, TarWriter

BATCHES = 14
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes")  # on one core


class Numbers(Shards):
    """Shards of records with a number of their own; some shards end early, some records are bad."""

    def __init__(self, *lengths: int, torn: Mapping[int, int] | None = None, bad: int = 0, called: str = "s") -> None:
        self.lengths, self.torn, self.bad, self.called = lengths, torn or {}, bad, called
        self.read_from: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def name(self, shard: int) -> str:
        return f"{self.called}{shard}"

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        self.read_from.append((shard, start))
        for number in range(start, self.torn.get(shard, self.lengths[shard])):
            yield {"key": f"{number}", "bad": bool(self.bad) and (7 * shard + number) % self.bad == 3}
        if shard in self.torn:
            raise ShardError(self.name(shard), f"cut off after {self.torn[shard]}")


class Plain(ShardDataset):
    """Records as they are."""

    def sample(self, record: Record, source: Mapping[str, Any]) -> dict[str, Any]:
        if record.get("bad"):
            raise BadSample("it is bad", "bad")
        return {}


class Keys:
    """A collator of keys and draws."""

    def prepare(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        return dict(sample)

    def stack(self, prepared: list[dict[str, Any]]) -> dict[str, Any]:
        return {"keys": [one["key"] for one in prepared], "draws": [one["draw"] for one in prepared]}


class Couples:
    """A grouping: the oldest waiting sample and the one whose number is the most like its own."""

    def __init__(self, choices: int) -> None:
        self.choices = choices

    def size(self, prepared: Mapping[str, Any]) -> tuple[int, int]:
        return int(prepared["key"].rpartition("/")[2]), 0

    def enough(self, sizes: np.ndarray) -> bool:
        return len(sizes) >= 7

    def choose(self, sizes: np.ndarray) -> list[int]:
        return [0, 1 + int(np.abs(sizes[1:, 0] - sizes[0, 0]).argmin())]

    def batch(self, groups: list[list[dict[str, Any]]]) -> dict[str, Any]:
        return Keys().stack([one for group in groups for one in group])


LENGTHS = (13, 5, 21, 1, 17, 9, 30, 4, 11, 8)


def one_source(**settings: Any) -> Plain:
    return Plain(Numbers(*LENGTHS, torn={2: 10}, bad=11), shuffle=4, **{"lanes": 4, "turns": 4, **settings})


def several(**settings: Any) -> Plain:
    sources = {
        "many": {"shards": Numbers(*LENGTHS, bad=9, called="m"), "weight": 3},
        "few": {"shards": Numbers(40, 60, torn={1: 33}, called="f"), "weight": 1},
        "none": {"shards": Numbers(5), "weight": 0},
    }
    return Plain(sources=sources, shuffle=4, **{"lanes": 4, "turns": 4, **settings})


def coupled(**settings: Any) -> Plain:
    """Read for samples that go together."""
    return several(**settings)


def stage(
    data: ShardDataset, folder: Path, *, rank: int = 0, world: int = 1, start: int = 0, batch: int = 8, **options: Any
) -> StageData:
    settings = {"batches": BATCHES, "max_bad_fraction": 0.5, "folder": folder, **options}
    found = StageData(data, Keys(), batch_size=batch // world, start_batch=start, **settings)
    found.trainer = SimpleNamespace(world_size=world, global_rank=rank)
    return found


def read(data: StageData, batches: int) -> list[dict[str, Any]]:
    """So many batches, as the trainer takes them."""
    found = iter(data.train_dataloader())
    return [data.on_before_batch_transfer(next(found), 0) for _ in range(batches)]


def joined(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The batches of all processes as those of one."""
    return [{name: [x for one in step for x in one[name]] for name in step[0]} for step in zip(*ranks, strict=True)]


def through_a_file(stages: list[StageData], folder: Path) -> dict[str, Any]:
    """What a checkpoint keeps of the positions of all processes."""
    torch.save({"positions": [one.position for one in stages]}, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("make", [one_source, several, coupled])
@pytest.mark.parametrize(
    ("before", "after"), [((0, 1), (0, 1)), ((2, 1), (4, 1)), ((0, 1), (2, 2)), ((0, 2), (0, 1)), ((4, 1), (0, 1))]
)
def test_a_stage_goes_on_whatever_prepared_it(make: Any, before: tuple, after: tuple, tmp_path: Path) -> None:
    """Pairs of numbers: data processes, processes."""
    (workers, world), (new_workers, new_world) = before, after

    def one_of(processes: int, folder: str = "parts", **options: Any) -> StageData:
        grouping = Couples(8 // processes) if make is coupled else None
        return stage(make(), tmp_path / folder, world=processes, grouping=grouping, **options)

    whole = one_of(1, "whole")
    expected = read(whole, BATCHES)
    killed = [one_of(world, rank=rank, num_workers=workers) for rank in range(world)]
    loaders = [iter(one.train_dataloader()) for one in killed]

    def some(count: int) -> list[list[dict[str, Any]]]:
        together = zip(killed, loaders, strict=True)
        return [[one.on_before_batch_transfer(next(loader), 0) for _ in range(count)] for one, loader in together]

    assert joined(some(5)) == expected[:5]
    state = through_a_file(killed, tmp_path)  # with the checkpoint; two further batches are read before the kill
    some(2)
    resumed = [one_of(new_world, rank=rank, num_workers=new_workers, start=5) for rank in range(new_world)]
    for one in resumed:
        one.load_state_dict(state)
    assert joined([read(one, BATCHES - 5) for one in resumed]) == expected[5:]
    if world == new_world == 1:
        files = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("whole", "parts")]
        assert files[0] == files[1]
        assert (resumed[0].ledger.tried, resumed[0].ledger.sources) == (whole.ledger.tried, whole.ledger.sources)
        assert resumed[0].position == whole.position
    waiting = [len(lane["waiting"]) for lane in resumed[0].position["lanes"].values()]
    assert all(5 <= count <= 7 for count in waiting) if make is coupled else not any(waiting)


@pytest.mark.parametrize("lanes", [1, 3, 8, 64])
@pytest.mark.parametrize("shuffle", [1, 4, 1000])
def test_every_record_comes_once_an_epoch(lanes: int, shuffle: int) -> None:
    total, seen = sum(LENGTHS), Counter[tuple[int, str]]()
    shards = Numbers(*LENGTHS)
    cursors = [ShardCursor(shards, number, lanes, seed=3, shuffle=shuffle) for number in range(lanes)]
    units = len(LENGTHS) * cursors[0].parts
    for cursor in cursors:
        for found in cursor:
            if found.cursor[0] * lanes + cursor.number >= 2 * units:  # of the third epoch
                break
            seen[found.shard, found.record["key"]] += 1
    assert len(seen) == total
    assert set(seen.values()) == {2}


def test_the_order_is_new_each_epoch_and_for_each_seed() -> None:
    def keys(seed: int) -> list[str]:
        way = iter(ShardCursor(Numbers(*LENGTHS), 0, 1, seed=seed, shuffle=6))
        return [f"{one.shard}/{one.record['key']}" for one, _ in zip(way, range(2 * sum(LENGTHS)), strict=False)]

    found, total = keys(0), sum(LENGTHS)
    assert sorted(found[:total]) == sorted(found[total:])
    assert found[:total] != found[total:]
    assert keys(0) == found
    assert keys(1) != found


def test_every_block_has_an_order_of_its_own() -> None:
    way = iter(ShardCursor(Numbers(8, 8), 0, 1, seed=0, shuffle=4))
    found = [next(way) for _ in range(32)]
    orders = [tuple(int(one.record["key"]) % 4 for one in found[first : first + 4]) for first in range(0, 32, 4)]
    assert len(set(orders)) > 5


def test_a_route_goes_on_by_reading_one_block_again() -> None:
    shards = Numbers(1000, 1000)
    way = iter(ShardCursor(shards, 0, 1, seed=0, shuffle=50))
    before = [next(way) for _ in range(1333)]
    shards.read_from.clear()
    cursor = ShardCursor(shards, 0, 1, seed=0, shuffle=50, cursor=before[1300].cursor)
    assert [next(iter(cursor)) for _ in range(3)] == before[1300:1303]
    assert shards.read_from[0][1] == 300
    assert shards.read_from[0] != (shards.read_from[0][0], 0)


def test_few_shards_stay_open_at_a_time() -> None:
    open_shards = OpenShards()
    shards = Numbers(*[50] * 300)
    cursors = [ShardCursor(shards, number, 300, seed=0, shuffle=5, open_shards=open_shards) for number in range(300)]
    ways = [iter(cursor) for cursor in cursors]
    found = [[next(way).record["key"] for way in ways] for _ in range(12)]
    assert len(open_shards.kept) == KEPT_OPEN
    alone = iter(ShardCursor(shards, 7, 300, seed=0, shuffle=5))
    assert [row[7] for row in found] == [next(alone).record["key"] for _ in range(12)]


def test_a_torn_shard_costs_its_rest_and_is_told_once_each_time_it_is_read(tmp_path: Path) -> None:
    data = Plain(Numbers(6, 6, torn={1: 2}), shuffle=4, lanes=1, turns=1)
    one = stage(data, tmp_path, batch=4)
    keys = [key for batch in read(one, 6) for key in batch["keys"]]
    assert Counter(keys[:24]) == Counter({f"s0/{n}": 3 for n in range(6)} | {f"s1/{n}": 3 for n in range(2)})
    rows = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert len(rows) == 3
    assert (
        '"key": "s1", "kind": "broken shard", "reason": "shard s1: cut off after 2", "counts": true, "source": "shards"'
        in rows[0]
    )
    assert one.ledger.summary().startswith("3 of 27 samples were skipped (broken shard: 3; of shards: 3)")


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_torn_shard_is_told_once_wherever_the_run_is_cut(cut: int, tmp_path: Path) -> None:
    def one(folder: str, **options: Any) -> StageData:
        data = Plain(Numbers(4, 5, torn={1: 3}), shuffle=2, lanes=1, turns=1)
        return stage(data, tmp_path / folder, batch=1, **options)

    read(one("whole"), 12)
    before = one("parts")
    read(before, cut)
    after = one("parts", start=cut)
    after.load_state_dict(through_a_file([before], tmp_path))
    read(after, 12 - cut)
    assert (tmp_path / "whole" / "skipped.jsonl").read_text() == (tmp_path / "parts" / "skipped.jsonl").read_text()


def test_shares_and_draws(tmp_path: Path) -> None:
    one = stage(several(), tmp_path, batches=128)
    batches = read(one, 128)
    sources = Counter(key.partition("/")[0][0] for batch in batches for key in batch["keys"])
    assert sources == {"m": 768, "f": 256}
    spots = [lane["spots"] for lane in one.position["lanes"].values()]
    assert all(cursor["none"] == (0, 0, 0, 0, 0) for cursor in spots)
    draws = [draw for batch in batches for draw in batch["draws"]]
    assert draws == [(0, place) for place in range(1024)]


def test_the_weights_rise_as_the_schedule_says(tmp_path: Path) -> None:
    knots = [{"step": 0, "weights": {"a": 1, "b": 0}}, {"step": 128, "weights": {"a": 0, "b": 1}}]
    data = Plain(sources={"a": Numbers(*[50] * 20), "b": Numbers(*[90] * 20)}, schedule=knots, lanes=2, turns=2)
    lanes = ShardStream(data, Keys(), ReaderLayout.for_step(2, 2, 16), batches=130)
    share = [sum(lanes.mixture.place(step * 16 + n)[0] == "b" for n in range(16)) / 16 for step in range(130)]
    assert sum(share[:64]) / 64 == pytest.approx(0.25, abs=0.02)
    assert sum(share[64:128]) / 64 == pytest.approx(0.75, abs=0.02)


def test_by_size_and_its_root() -> None:
    sources = {"a": {"shards": Numbers(1, 1), "samples": 900}, "b": {"shards": Numbers(1), "samples": 100}}
    assert Plain(sources=sources, weights="size").knots[0]["weights"] == {"a": 900, "b": 100}
    assert Plain(sources=sources, weights="sqrt").knots[0]["weights"] == {"a": 30, "b": 10}
    del sources["a"]["samples"], sources["b"]["samples"]
    assert Plain(sources=sources, weights="size").knots[0]["weights"] == {"a": 2, "b": 1}


def test_layouts_do_not_depend_on_the_number_of_processes() -> None:
    assert ReaderLayout.for_step(8, 4, 2 * 12) == ReaderLayout.for_step(8, 4, 24) == ReaderLayout(8, 4, 3)
    assert ReaderLayout.for_step(8, 4, 6) == ReaderLayout(2, 4, 3)
    owned = [lane for rank in range(4) for lane in ReaderLayout(8, 4, 3).readers_of(5, rank, 4)]
    assert owned == list(range(8, 16))
    places = sorted(ReaderLayout(4, 3, 2).place(lane, count) for lane in range(12) for count in range(6))
    assert places == list(range(72))


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 processes cannot share the 4 lanes .* fitting numbers of processes: 1, 2, 4; .*=12"):
        stage(one_source(), tmp_path, world=3, batch=24).train_dataloader()
    with pytest.raises(ValueError, match="3 data processes cannot share the 4 turns evenly"):
        stage(one_source(), tmp_path, num_workers=3).train_dataloader()
    with pytest.raises(ValueError, match=r"has 4 of the 4 lanes of a step; give data\.lanes=1"):
        stage(one_source(), tmp_path, grouping=Couples(1)).train_dataloader()
    with pytest.raises(ValueError, match="does not say where its data stood"):
        stage(one_source(), tmp_path, start=3).train_dataloader()
    first = stage(one_source(), tmp_path)
    read(first, 2)
    other = stage(one_source(lanes=2), tmp_path, start=2)
    other.load_state_dict(through_a_file([first], tmp_path))
    with pytest.raises(ValueError, match=r"stands in lanes \(4, 4, 2\).*the settings ask for \(2, 4, 4\)"):
        other.train_dataloader()
    empty = stage(Plain(Numbers(*[0] * 40), lanes=1), tmp_path)
    with pytest.raises(ValueError, match="32 shards in a row hold no sample"):
        read(empty, 1)
    with pytest.raises(ValueError, match=r"source shards: 32 samples in a row cannot be used; the first one: .*it is bad"):
        read(stage(Plain(BadOnes(50), lanes=1), tmp_path), 1)
    with pytest.raises(ValueError, match=r"more than data\.max_bad_fraction=0\.0\. The last one: s\d/\d+: it is bad"):
        read(stage(Plain(Numbers(50, 50, bad=4)), tmp_path, max_bad_fraction=0.0), 3)


class BadOnes(Numbers):
    """Nothing but bad records."""

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        return ({**record, "bad": True} for record in super().read(shard, start))


def test_the_first_samples(tmp_path: Path) -> None:
    found = [one["key"] for one in stage(one_source(), tmp_path).first(6)]
    assert found == read(stage(one_source(), tmp_path), 1)[0]["keys"][:6]
    with pytest.raises(ValueError, match="it is bad"):
        stage(Plain(Numbers(50, 50, bad=4)), tmp_path, max_bad_fraction=0.0).first(40)


@pytest.mark.parametrize("lanes", [1, 5])
def test_a_tar_file_is_opened_where_the_block_stands(lanes: int, tmp_path: Path) -> None:
    """Nothing before the block is looked at: what stands there may even have been overwritten."""
    paths = [tmp_path / f"{number}.tar" for number in range(2)]
    for path in paths:
        with TarWriter(path) as tar:
            for record in range(60):
                tar.write(
                    {
                        "key": f"{'long' * 30}{record}" if record % 7 == 0 else str(record),
                        "txt": f"text {record}",
                        "jpg": b"1" * 600,
                    }
                )
    way = iter(ShardCursor(TarShards(paths), 0, lanes, seed=0, shuffle=4))
    found = [next(way) for _ in range(17)]
    cursor = found[11].cursor
    assert cursor.start > cursor.number > 0
    for path in paths:
        with path.open("r+b") as file:
            file.write(b"x" * cursor.byte)
    again = iter(ShardCursor(TarShards(paths), 0, lanes, seed=0, shuffle=4, cursor=cursor))
    assert [next(again).record for _ in range(2)] == [one.record for one in found[11:13]]
