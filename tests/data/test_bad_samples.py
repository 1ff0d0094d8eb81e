"""Bad samples: named, counted, replaced by others that are always the same, and a stop where they are too many."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import Dataset

from lightning_internvl.data.bad_samples import TRIES, BadSample, Ledger, Skipped, Unwanted, time_limit
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.module import SKIPPED, StageData
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer

LENGTH, BATCHES, SIZE = 20, 12, 4
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core


class Numbers(Dataset[dict[str, Any]]):
    """Twenty numbers, some of which cannot be read."""

    def __init__(self, bad: tuple[int, ...] = (3, 11), error: type[ValueError] = BadSample) -> None:
        self.bad, self.error = bad, error

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position % LENGTH in self.bad:
            raise self.error(f"numbers, line {position + 1}: no number")
        return {"key": str(position), "value": position}


class SlowNumbers(Numbers):
    """Of which one takes for ever, and swallows what should end it once."""

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position % LENGTH == 3:
            with contextlib.suppress(BadSample):
                time.sleep(60)
            time.sleep(60)
        return super().__getitem__(position)


class Collate:
    """Batches of numbers; 7 cannot be prepared."""

    def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
        if sample["value"] == 7:
            raise ValueError(f"sample {sample['key']}: seven")
        return sample

    def stack(self, prepared: list[dict[str, Any]]) -> dict[str, Any]:
        return {"keys": [one["key"] for one in prepared], "draws": [one["draw"] for one in prepared]}


def stage(folder: Path, data: Dataset[Any], workers: int = 0, start: int = 0, share: float = 1.0, **options: Any) -> StageData:
    found = StageData(
        data, Collate(), batch_size=SIZE, batches=BATCHES, start_batch=start, num_workers=workers, max_bad_fraction=share,
        folder=folder, **{"endless": False, **options},
    )  # fmt: skip
    found.trainer = SimpleNamespace(world_size=1, global_rank=0)
    return found


def read(data: StageData, batches: int = BATCHES) -> list[dict[str, Any]]:
    """So many batches, as the trainer takes them."""
    found = iter(data.train_dataloader())
    try:
        return [data.on_before_batch_transfer(next(found), 0) for _ in range(batches)]
    finally:
        del found  # with its processes: an error that is looked at keeps this frame


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stage_skips_and_counts_the_same(workers: int, tmp_path: Path) -> None:
    whole, parts = stage(tmp_path / "whole", Numbers()), tmp_path / "parts"
    expected = read(whole)
    assert SKIPPED not in expected[0]
    assert all(len(batch["keys"]) == SIZE for batch in expected)
    assert not {"3", "7", "11"} & {key for batch in expected for key in batch["keys"]}
    read(stage(parts, Numbers(), workers), batches=9)  # prepared ahead, then killed after the checkpoint of batch 5
    resumed = stage(parts, Numbers(), workers, start=5)
    assert read(resumed, BATCHES - 5) == expected[5:]
    assert rows(parts) == rows(tmp_path / "whole")
    assert resumed.ledger.tried == whole.ledger.tried == SIZE * BATCHES + len(rows(parts))
    assert resumed.ledger.kinds == whole.ledger.kinds
    assert {row["reason"] for row in rows(parts)} == {
        "numbers, line 4: no number", "numbers, line 12: no number", "sample 7: seven",
    }  # fmt: skip


def test_good_data_is_read_as_if_there_were_no_ledger(tmp_path: Path) -> None:
    class Any7(Collate):
        def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
            return sample

    found = [stage(tmp_path, Numbers(()), share=share) for share in (0.0, 0.5)]
    for one in found:
        one.collate = Any7()
    assert read(found[0]) == read(found[1])
    assert not (tmp_path / "skipped.jsonl").exists()
    assert found[1].ledger.summary() is None


def test_what_is_said_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = stage(tmp_path, Numbers())
    read(data)
    data.teardown("fit")
    said = " ".join(capsys.readouterr().out.split())
    assert f"{len(rows(tmp_path))} of {data.ledger.tried} samples were skipped (refused: " in said
    assert "skipped.jsonl names them" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_stop_the_run(workers: int, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"of \d+ samples cannot be used .*more than data\.max_bad_fraction=0\.1.*line|seven"
    ) as e:
        read(stage(tmp_path, Numbers(), workers, share=0.1))
    assert "skipped.jsonl" in str(e.value)
    assert rows(tmp_path)


def test_the_first_one_stops_the_run_where_none_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^(numbers, line \d+: no number|sample 7: seven)$"):
        read(stage(tmp_path, Numbers(), share=0.0))


def test_nothing_but_bad_samples_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{TRIES} samples in a row cannot be used; the first one: numbers, line"):
        read(stage(tmp_path, Numbers(tuple(range(LENGTH)))), batches=1)


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError("too deep"), MemoryError(), TypeError("\ud800 is no text")])
def test_any_error_of_a_sample_is_one_skip_with_its_kind(tmp_path: Path, error: Exception) -> None:
    class Broken(Collate):
        def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
            if sample["value"] in (3, 11):
                raise error
            return sample

    data = stage(tmp_path, Numbers(()))
    data.collate = Broken()
    assert not {"3", "11"} & {key for batch in read(data) for key in batch["keys"]}
    found = rows(tmp_path)
    assert {row["key"] for row in found} == {"3", "11"}
    assert all(row["kind"] == type(error).__name__ and row["reason"].startswith(type(error).__name__) for row in found)


def test_an_error_of_all_samples_ends_the_run_with_its_kind(tmp_path: Path) -> None:
    class Broken(Collate):
        def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
            raise KeyError("a fault of the program")

    data = stage(tmp_path, Numbers())
    data.collate = Broken()
    with pytest.raises(ValueError, match="32 samples in a row cannot be used; the first one: KeyError: 'a fault of the program'"):
        read(data, batches=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_may_not_take_longer_than_the_limit(tmp_path: Path, workers: int) -> None:
    data = stage(tmp_path, SlowNumbers(()), workers, max_sample_seconds=0.2)
    assert not {"3"} & {key for batch in read(data, 5) for key in batch["keys"]}
    (slow,) = {(row["kind"], row["reason"]) for row in rows(tmp_path) if row["key"] != "7"}
    assert slow == ("too slow", "it takes longer than data.max_sample_seconds=0.2")


def test_the_alarm_of_another_is_kept() -> None:
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append("theirs"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with time_limit(60):
            pass
        time.sleep(0.2)
        assert heard == ["theirs"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_endless_source_is_asked_for_another_sample(tmp_path: Path) -> None:
    keys = [int(key) for batch in read(stage(tmp_path, Numbers(), endless=True)) for key in batch["keys"]]
    assert sum(key >= SIZE * BATCHES for key in keys) == len({row["place"] for row in rows(tmp_path)}) > 0


def test_what_the_settings_leave_out_is_counted_but_stops_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl", max_bad_fraction=0.0, start=0, batch_size=1, epoch=None)
    ledger.add([Skipped(0, "a", Unwanted("x").kind, "too long", Unwanted.counts)] * 5)
    assert (ledger.bad, ledger.kinds.total(), ledger.tried) == (0, 5, 6)


def test_a_share_is_judged_after_an_epoch_or_a_thousand_samples(tmp_path: Path) -> None:
    for epoch, allowed in ((None, 10), (10**6, 10), (100, 1)):
        ledger = Ledger(tmp_path / f"{epoch}.jsonl", max_bad_fraction=0.01, start=0, batch_size=1, epoch=epoch)
        for place in range(allowed):
            ledger.add([Skipped(place, str(place), "k", "bad")])
        with pytest.raises(ValueError, match=f"{allowed + 1} of {2 * allowed + 2} samples cannot be used"):
            ledger.add([Skipped(allowed, "x", "k", "bad")])


def test_a_torn_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    row = {"batch": 0, "place": 1, "key": "a", "kind": "k", "reason": "r", "counts": True}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "batch": 3}) + "\n" + '{"batch": ')
    ledger = Ledger(path, max_bad_fraction=1.0, start=2, batch_size=4, epoch=None)
    assert (ledger.bad, ledger.tried) == (1, 9)
    assert rows(tmp_path) == [row]


@pytest.mark.parametrize("too_long", ["cut", "skip"])
def test_long_conversations_are_cut_or_left_out(too_long: str) -> None:
    tokenizer = toy_tokenizer()
    collate = ChatCollator(tokenizer, load_template("chatml", ""), Squash(8), 1, 40, too_long=too_long)
    turns = [{"role": ("user", "assistant")[place % 2], "content": "red"} for place in range(20)]
    sample = {"images": [], "conversation": turns, "key": "a"}
    if too_long == "skip":
        with pytest.raises(Unwanted, match=r"sample a: it has \d+ tokens, more than 40, and data\.too_long is skip"):
            collate.prepare(sample)
    else:
        assert 0 < len(collate.prepare(sample)["row"][0]) <= 40
    assert collate.prepare({**sample, "conversation": turns[:2]})["key"] == "a"
    with pytest.raises(ValueError, match="too_long='foo' is not known; valid choices: cut, skip"):
        ChatCollator(tokenizer, load_template("chatml", ""), Squash(8), 1, 40, too_long="foo")
