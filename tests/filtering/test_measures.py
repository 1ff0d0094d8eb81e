"""Scores that need no model."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.scenes.datasets import ScenePairs
from lightning_internvl.filtering import measures
from lightning_internvl.filtering.measures import caption_hash, measure_pair, picture_hash, script_shares


def apart(one: np.ndarray, two: np.ndarray) -> int:
    return (picture_hash(one) ^ picture_hash(two)).bit_count()


def saved(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_a_pair_is_measured() -> None:
    row = measure_pair(np.zeros((10, 25, 3), dtype=np.uint8), "Two cats, 两只猫!", (50, 20))
    assert {name: row[name] for name in ("width", "height", "side", "aspect")} == {
        "width": 50, "height": 20, "side": 20, "aspect": 2.5,
    }  # fmt: skip
    assert row["characters"] == len("Two cats, !") + 3 * len("两只猫")
    assert row["words"] == 5
    assert row["scripts"] == {"latin": 0.7, "han": 0.3}


@pytest.mark.parametrize("caption", ["红色的汽车", "赤い車", "سيارة حمراء", "ein rotes Auto", "รถสีแดง", "ឡានក្រហម"])
def test_no_language_has_too_few_words_by_its_writing(caption: str) -> None:
    row = measure_pair(np.zeros((10, 25, 3), dtype=np.uint8), caption, (50, 20))
    assert row["words"] >= 2
    assert row["characters"] >= 5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("кот", {"cyrillic": 1.0}),
        ("ねこ カメラ", {"kana": 1.0}),
        ("고양이", {"hangul": 1.0}),
        ("123 !?", {}),
        ("ＡＢ", {"latin": 1.0}),
    ],
)
def test_scripts_of_letters(text: str, found: dict[str, float]) -> None:
    assert script_shares(text) == found


def test_captions_that_say_the_same_are_equal() -> None:
    assert caption_hash("A cat,  on RED.") == caption_hash("a cat on red")
    assert caption_hash("a cat on red") != caption_hash("a cat on blue")
    assert caption_hash("ｃａｔ") == caption_hash("cat")


def test_alike_pictures_have_near_hashes_and_others_do_not() -> None:
    scenes = ScenePairs(0, "train", 64)
    images = [scenes[index]["image"] for index in range(200)]
    larger = np.asarray(Image.fromarray(images[0]).resize((96, 96), Image.Resampling.BICUBIC))
    assert apart(images[0], images[0]) == 0
    assert apart(images[0], larger) <= 6
    assert max(apart(image, saved(image, 60)) for image in images[:50]) <= 6
    hashes = np.array([picture_hash(image) for image in images], dtype=np.uint64)
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert np.sort(distances + 64 * np.eye(len(images), dtype=int), axis=None)[0] > 6


def test_a_guessed_language_and_its_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    measures.language_identifier.cache_clear()
    with pytest.raises(ValueError, match=r"rules\.language.*pip install -r requirements-language\.txt"):
        measures.language_identifier()
    monkeypatch.setattr(measures, "language_identifier", lambda: SimpleNamespace(classify=lambda text: ("de", np.float32(0.75))))
    row = measure_pair(np.zeros((8, 8, 3), dtype=np.uint8), "zwei Katzen", (8, 8), language=True)
    assert (row["language"], row["language_probability"]) == ("de", 0.75)


def test_languages_are_guessed() -> None:
    pytest.importorskip("py3langid", reason="guessing languages needs py3langid: pip install -r requirements-language.txt")
    measures.language_identifier.cache_clear()
    said = {
        "two cats are sitting on a red sofa": "en",
        "zwei Katzen sitzen auf einem roten Sofa": "de",
        "两只猫坐在红色的沙发上": "zh",
    }
    rows = [measure_pair(np.zeros((8, 8, 3), dtype=np.uint8), text, (8, 8), language=True) for text in said]
    assert [row["language"] for row in rows] == list(said.values())
    assert all(0.5 < row["language_probability"] <= 1 for row in rows)


def test_hashes_are_the_same_on_every_machine() -> None:
    ramp = np.arange(48 * 48 * 3, dtype=np.int64).reshape(48, 48, 3) % 251
    assert f"{picture_hash(ramp.astype(np.uint8)):016x}" == "bf483a583f462f42"
    assert f"{caption_hash('a cat'):016x}" == "67f5dfb40b23dda2"
