"""Which pairs are kept, from scores alone: checked against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from runs import ROOT

from lightning_internvl.filtering import decide as module
from lightning_internvl.filtering.decide import (
    BAD,
    KEPT,
    Columns,
    decide,
    near_duplicates,
    reason_code,
    repeated_pairs,
    write_columns,
)
from lightning_internvl.filtering.measures import TOLD_LANGUAGE, language_of, measure_pair

NO_RULES: dict[str, Any] = {}


def row(**given: Any) -> dict[str, Any]:
    usual = {
        "key": "k", "side": 64, "aspect": 1.0, "characters": 20, "words": 4, "scripts": {"latin": 0.75, "greek": 0.25},
        "picture": "0", "caption": "0", "similarity": 0.5,
    }  # fmt: skip
    return usual | given


def columns(folder: Path, shards: list[list[dict[str, Any]]], rules: dict[str, Any] = NO_RULES) -> Columns:
    for number, rows in enumerate(shards):
        write_columns(folder, number, rows, rules)
    return Columns.join(folder, len(shards))


def reasons(found: Columns) -> list[int]:
    return found.column("reason").tolist()


def hashes(seed: int, count: int, few_bits: int) -> list[int]:
    """Numbers that often differ in few bits: copies of some, with up to `few_bits` of them changed."""
    rng = np.random.default_rng(seed)
    first = [int(x) for x in rng.integers(0, 2**63, count // 4, dtype=np.uint64)]
    made = []
    for _ in range(count):
        value = first[int(rng.integers(len(first)))]
        for bit in rng.integers(0, 64, int(rng.integers(few_bits + 1))):
            value ^= 1 << int(bit)
        made.append(value)
    return made


def two_shards(folder: Path, name: str, values: list[int]) -> Columns:
    rows = [row(**{name: f"{value:016x}"}) for value in values]
    return columns(folder, [rows[: len(rows) // 3], rows[len(rows) // 3 :]])


@pytest.fixture(params=[2**24, 7])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything in memory at once, and in many parts."""
    monkeypatch.setattr(module, "PIECE", request.param)
    return request.param


@pytest.mark.parametrize(
    ("rule", "limits", "values", "kept"),
    [
        ("side", {"min": 16}, [15, 16, 17], [16, 17]),
        ("aspect", {"max": 3}, [3.0, 3.01], [3.0]),
        ("words", {"min": 2, "max": 5}, [1, 2, 5, 6], [2, 5]),
        ("similarity", {"min": 0.25, "max": None}, [0.249999, 0.25, -1.0], [0.25]),
        ("scripts", {"allowed": ["latin", "han"], "min": 0.8}, [{"latin": 0.5, "han": 0.3}, {"latin": 0.7}, {}], [0]),
    ],
)
def test_limits_of_one_pair(tmp_path: Path, rule: str, limits: dict[str, Any], values: list[Any], kept: list[Any]) -> None:
    found = reasons(columns(tmp_path, [[row(**{rule: value}) for value in values]], {rule: limits}))
    expected = [values[0]] if rule == "scripts" else kept
    assert [value for value, reason in zip(values, found, strict=True) if reason == KEPT] == expected
    assert set(found) <= {KEPT, reason_code(rule)}


def test_the_first_rule_counts_and_rows_without_scores_are_bad(tmp_path: Path) -> None:
    rules = {"words": {"min": 2}, "side": {"min": 16}, "language": {"allowed": ["en"], "min": 0.5}}
    spoken = {"language": "en", "language_probability": 0.9}
    rows = [row(side=1, words=1, **spoken), row(words=1, **spoken), row(**spoken), row(**spoken | {"language": "de"})]
    found = reasons(columns(tmp_path, [rows, [{"key": "x", "unusable": "unreadable image", "reason": "cut off"}]], rules))
    assert found == [reason_code("side"), reason_code("words"), KEPT, reason_code("language"), BAD]


def test_of_equal_captions_the_first_ones_stay(tmp_path: Path, piece: int) -> None:
    values = [value % 9 for value in hashes(3, 60, 0)]
    found = two_shards(tmp_path, "caption", values)
    decide(found, {"same_caption": {"copies": 2}})
    kept = [reason == KEPT for reason in reasons(found)]
    assert kept == [values[:at].count(value) < 2 for at, value in enumerate(values)]


def test_the_top_share_is_that_of_each_language(tmp_path: Path, piece: int) -> None:
    """The model is surer of English; a share of all would keep nothing else."""
    rows = [row(told_language=name, similarity=high + n / 100) for name, high in (("en", 0.5), ("ar", 0.1)) for n in range(10)]
    found = columns(tmp_path, [rows])
    assert decide(found, {"similarity": {"keep_share": 0.3}}) == pytest.approx(0.17)
    assert [place for place, reason in enumerate(reasons(found)) if reason == KEPT] == [7, 8, 9, 17, 18, 19]


FIVE = {
    "en": ("a red car stands in front of the old house", "two children play with a ball on the beach"),
    "de": ("ein rotes Auto steht vor dem alten Haus", "zwei Kinder spielen am Strand mit einem Ball"),
    "zh": ("一辆红色的汽车停在老房子前面", "两个孩子在海滩上玩球"),
    "ja": ("赤い車が古い家の前に止まっています", "二人の子供が海岸でボール遊びをしている"),
    "ko": ("빨간 자동차가 오래된 집 앞에 서 있다", "두 아이가 해변에서 공놀이를 하고 있다"),
}


@pytest.mark.parametrize("told", [True, False])
def test_the_defaults_keep_as_much_of_each_of_five_languages(tmp_path: Path, told: bool) -> None:
    """Of twenty pictures, each with a caption in every language; the model is surer of some. Nobody tells or all records do."""
    if not told:
        pytest.importorskip("py3langid", reason="guessing languages needs py3langid: pip install -r requirements-language.txt")
    picture, rows, names = np.zeros((32, 32, 3), dtype=np.uint8), [], []
    for number in range(20):
        for place, (name, texts) in enumerate(FIVE.items()):
            scores = measure_pair(picture, f"{texts[number % 2]} {number}", (32, 32), language=not told)
            scores |= {"key": "k", "picture": f"{number + 1:x}", "similarity": 0.5 - 0.1 * place + number / 1000}
            rows.append(scores | ({TOLD_LANGUAGE: name} if told else {}))
            names.append(name)
    rules = yaml.safe_load((ROOT / "conf" / "stage" / "filter.yaml").read_text())["rules"]
    found = columns(tmp_path, [rows], rules)
    decide(found, rules)
    kept = [name for name, reason in zip(names, reasons(found), strict=True) if reason == KEPT]
    assert {name: kept.count(name) for name in FIVE} == dict.fromkeys(FIVE, 10)


def test_what_a_caption_is_written_in() -> None:
    unsure = {"language": "nl", "language_probability": 0.2, "scripts": {"latin": 1.0}}
    assert language_of(unsure) == "latin"
    assert language_of(unsure | {"language_probability": 0.9}) == "nl"
    assert language_of({"scripts": {"han": 0.7, "kana": 0.3}}) == "kana"
    assert language_of({"scripts": {"han": 0.98, "kana": 0.02}}) == "han"
    assert language_of({}) == ""


def test_rare_languages_share_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_internvl.filtering.decide.APART", 1)
    names = ["en"] * 4 + ["ar", "he", "th", "ko"]
    found = columns(tmp_path, [[row(told_language=name, similarity=n / 10) for n, name in enumerate(names)]])
    decide(found, {"similarity": {"keep_share": 0.5}})
    assert [place for place, reason in enumerate(reasons(found)) if reason == KEPT] == [2, 3, 6, 7]


def test_a_pair_that_a_rule_drops_is_nobodys_first(tmp_path: Path) -> None:
    found = columns(tmp_path, [[row(side=1, picture="a"), row(picture="a"), row(picture="a")]], {"side": {"min": 16}})
    decide(found, {"same_picture": {"distance": 0}})
    assert reasons(found) == [reason_code("side"), KEPT, reason_code("same_picture")]


@pytest.mark.parametrize("distance", [0, 2])
def test_captions_of_other_languages_are_no_copies(tmp_path: Path, distance: int) -> None:
    said = [
        {"told_language": "de"}, {"told_language": "en"}, {"told_language": "de"}, {"language": "de"}, {"scripts": {"han": 1.0}},
        {"scripts": {"latin": 0.6, "han": 0.4}}, {"scripts": {"han": 1.0}}, {"told_language": "zh", "scripts": {"han": 1.0}},
    ]  # fmt: skip
    found = columns(tmp_path, [[row(picture="a", **one) for one in said]])
    decide(found, {"same_picture": {"distance": distance}})
    assert [place for place, reason in enumerate(reasons(found)) if reason != KEPT] == [2, 3, 6]


@pytest.mark.parametrize("distance", [1, 3, 6])
def test_alike_pictures_are_all_found_and_no_others(tmp_path: Path, distance: int, piece: int) -> None:
    values = hashes(distance, 80, distance)
    found = two_shards(tmp_path, "picture", values)
    decide(found, {"same_picture": {"distance": distance}})
    kept = [at for at, reason in enumerate(reasons(found)) if reason == KEPT]
    assert 0 in kept
    assert all((values[a] ^ values[b]).bit_count() > distance for a in kept for b in kept if a < b)
    for at in set(range(len(values))) - set(kept):  # each was dropped for an earlier one
        assert any((values[at] ^ values[before]).bit_count() <= distance for before in range(at))


def test_bands_are_all_of_the_bits(tmp_path: Path) -> None:
    found = two_shards(tmp_path, "picture", [0, 1 << 63, 1, 0b11 << 31])
    assert repeated_pairs(found, "picture", 1).tolist() == []
    near = {place for band in range(3) for place in near_duplicates(found, 2, band).tolist()}
    assert near == {1, 2, 3}


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_top_share_is_exact_and_keeps_ties(tmp_path: Path, share: float, piece: int) -> None:
    values = [round(float(x), 6) for x in np.random.default_rng(0).normal(0.2, 0.3, 50).clip(-1, 1)] + [0.2] * 5 + [1.000001]
    found = columns(tmp_path, [[row(similarity=value) for value in values], [row(side=1)]], {"side": {"min": 16}})
    threshold = decide(found, {"similarity": {"keep_share": share}})
    expected = sorted(values, reverse=True)[round(share * len(values) + 0.4999) - 1]
    assert threshold == pytest.approx(expected, abs=1e-9)
    kept = [value for value, reason in zip(values, reasons(found), strict=False) if reason == KEPT]
    assert kept == [value for value in values if value >= expected]


def test_fewer_pairs_than_copies_are_allowed(tmp_path: Path) -> None:
    found = columns(tmp_path, [[row(), row()]])
    assert repeated_pairs(found, "caption", 5).tolist() == []
    assert repeated_pairs(found, "caption", 1).tolist() == [1]


def test_no_pairs_at_all(tmp_path: Path) -> None:
    found = columns(tmp_path, [[], []])
    assert decide(found, {"same_picture": {"distance": 2}, "same_caption": {"copies": 1}}) is None
    assert (len(found), found.reasons(1)) == (0, [])
