"""Shares, epochs, schedules and resume of mixtures."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lightning_internvl.data.order.mixture import BLOCK, Mixture


class Numbers:
    """A dataset of `length` numbers; endless without."""

    def __init__(self, name: str, length: int | None = None) -> None:
        self.name, self.length = name, length
        if length is not None:
            self.__class__ = Finite

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"key": f"{self.name}/{index}"}


class Finite(Numbers):
    def __len__(self) -> int:
        return self.length


def sources(mixture: Mixture, positions: range) -> Counter[str]:
    return Counter(mixture[p]["source"] for p in positions)


def test_shares_are_kept_in_every_block() -> None:
    mixture = Mixture({"a": Numbers("a"), "b": Numbers("b")}, {"a": 3, "b": 1})
    for block in (0, 7):
        found = sources(mixture, range(block * BLOCK, (block + 1) * BLOCK))
        assert found == {"a": BLOCK * 3 // 4, "b": BLOCK // 4}
    assert len({mixture[p]["source"] for p in range(8)}) == 2  # mixed, not one after the other


@pytest.mark.parametrize(("rule", "share"), [("size", 100 / 109), ("sqrt", 10 / 13)])
def test_weights_by_size(rule: str, share: float) -> None:
    mixture = Mixture({"a": Numbers("a", 100), "b": Numbers("b", 9)}, rule)
    assert mixture.share(0)["a"] == pytest.approx(share)
    assert sources(mixture, range(10 * BLOCK))["a"] == pytest.approx(10 * BLOCK * share, abs=1)


def test_every_epoch_of_a_dataset_holds_each_sample_once_in_a_new_order() -> None:
    mixture = Mixture({"a": Numbers("a", 50), "b": Numbers("b", 7)}, {"a": 0.3, "b": 0.7})
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for position in range(3000):
        name, index = mixture.place(position)
        seen[name].append(index)
    for name, length in (("a", 50), ("b", 7)):
        epochs = [seen[name][i : i + length] for i in range(0, len(seen[name]) - length, length)]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_endless_datasets_are_read_in_order() -> None:
    mixture = Mixture({"a": Numbers("a"), "b": Numbers("b", 3)}, {"a": 1, "b": 1})
    keys = [mixture[p]["key"] for p in range(2 * BLOCK)]
    assert [key for key in keys if key.startswith("a")] == [f"a/{i}" for i in range(BLOCK)]


def test_a_position_does_not_depend_on_what_was_read_before() -> None:
    def make() -> Mixture:
        return Mixture({"a": Numbers("a", 50), "b": Numbers("b")}, {"a": 0.37, "b": 0.63}, seed=5)

    forwards = make()
    expected = [forwards[p] for p in range(20 * BLOCK)]
    for position in np.random.default_rng(0).integers(0, 20 * BLOCK, 100).tolist():
        assert make()[position] == expected[position]
    other = Mixture({"a": Numbers("a", 50), "b": Numbers("b")}, {"a": 0.37, "b": 0.63}, seed=6)
    assert [other[p] for p in range(50)] != expected[:50]


def test_a_schedule_moves_the_shares_with_the_step() -> None:
    schedule = [{"step": 0, "weights": {"text": 1, "image": 0}}, {"step": 1000, "weights": {"text": 7, "image": 3}}]
    mixture = Mixture({"text": Numbers("t"), "image": Numbers("i")}, schedule=schedule, samples_per_step=32)
    assert mixture.share(0) == {"text": 1.0, "image": 0.0}
    assert mixture.share(500 * 32)["image"] == pytest.approx(0.15)
    assert mixture.share(10**9)["image"] == pytest.approx(0.3)
    warm = sources(mixture, range(32 * 1024))  # the mean share on the way up is a half of the last one
    assert warm["image"] == pytest.approx(32 * 1024 * 0.15, rel=0.05)
    assert sources(mixture, range(100 * BLOCK, 110 * BLOCK))["image"] == pytest.approx(10 * BLOCK * 0.3, abs=1)
    images = [mixture[p]["key"] for p in range(2 * BLOCK) if mixture[p]["source"] == "image"]
    assert images == [f"i/{n}" for n in range(len(images))]


def test_one_dataset_may_take_over_from_another() -> None:
    schedule = [{"step": 0, "weights": {"a": 1, "b": 0}}, {"step": 3 * BLOCK, "weights": {"a": 0, "b": 1}}]
    mixture = Mixture({"a": Numbers("a"), "b": Numbers("b")}, schedule=schedule)
    assert sources(mixture, range(5 * BLOCK, 6 * BLOCK)) == {"b": BLOCK}


def test_runs_keep_batches_of_one_kind() -> None:
    mixture = Mixture({"a": Numbers("a"), "b": Numbers("b", 10)}, {"a": 1, "b": 1}, run=4)
    batches = [[mixture[4 * i + j] for j in range(4)] for i in range(100)]
    assert all(len({sample["source"] for sample in batch}) == 1 for batch in batches)
    assert {batch[0]["source"] for batch in batches} == {"a", "b"}
    keys = [s["key"] for batch in batches for s in batch if s["source"] == "a"]
    assert keys == [f"a/{i}" for i in range(len(keys))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"a": 1}}, "weights for a, but the datasets are a, b"),
        ({"weights": {"a": -1, "b": 2}}, "must be 0 or more"),
        ({"weights": {"a": 0, "b": 0}}, "must be 0 or more"),
        ({"weights": "cube"}, "'cube' is not known; valid choices: size, sqrt"),
        ({"weights": "size"}, "needs datasets with a length; without one: b"),
        ({"schedule": [{"step": 5, "weights": {"a": 1, "b": 1}}]}, "start at 0 and rise"),
        ({"weights": {"a": 1, "b": 1}, "run": 0}, "run=0"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture({"a": Numbers("a", 5), "b": Numbers("b")}, **settings)


def test_it_has_no_length() -> None:
    with pytest.raises(TypeError, match="endless=true"):
        len(Mixture({"a": Numbers("a")}, {"a": 1}))
