"""Labelled pictures: the built-in single things, and folders with one class each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_internvl.data.collate.labels import LabelCollator
from lightning_internvl.data.files.labelled_folder import FolderLabels, HeldOutFolder
from lightning_internvl.data.processors.basic import RandomCrop, Squash
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.data.scenes.labels import SceneLabels
from lightning_internvl.data.scenes.things import THINGS


def test_single_things_take_turns_and_are_not_those_that_are_measured() -> None:
    data = SceneLabels(seed=0, classes=48, image_size=32)
    samples = [data[i] for i in range(96)]
    assert [sample["label"] for sample in samples] == list(range(48)) * 2
    assert samples[0]["image"].shape == (32, 32, 3)
    assert np.array_equal(samples[5]["image"], data[5]["image"])
    held_out = HeldOutScenes(seed=0, image_size=32, single=96).labelled()
    measured = {image.tobytes() for image in held_out.images}
    assert held_out.labels[:48] == list(range(48))
    assert not any(sample["image"].tobytes() in measured for sample in samples)
    with pytest.raises(IndexError, match="sample 3 of 3"):
        SceneLabels(seed=0, classes=len(THINGS), length=3)[3]
    with pytest.raises(ValueError, match="show 48 things, but classes=10"):
        SceneLabels(seed=0, classes=10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of two pictures: classes b, a, c are written in another order than they are numbered."""
    for place, name in enumerate(("b", "a", "c")):
        for number in range(2):
            path = tmp_path / name / ("deep" if number else ".") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6 + place, 4), (place * 40, number, 0)).save(path)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    return tmp_path


def test_folders_are_classes_in_the_order_of_their_names(folder: Path) -> None:
    data = FolderLabels(folder, classes=3)
    assert [(data[i]["key"], data[i]["label"]) for i in range(len(data))] == [
        ("a/0.png", 0), ("a/deep/1.png", 0), ("b/0.png", 1), ("b/deep/1.png", 1), ("c/0.png", 2), ("c/deep/1.png", 2),
    ]  # fmt: skip
    assert data[1]["image"].shape == (4, 7, 3)
    assert tuple(data[1]["image"][0, 0]) == (40, 1, 0)


def test_folders_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds 3 folders, one a class, but classes=4"):
        FolderLabels(folder, classes=4)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        FolderLabels(folder / "nowhere", classes=3)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no picture; known kinds: .*jpg"):
        len(FolderLabels(folder, classes=4))


def test_pictures_to_measure_are_read_as_they_are_asked_for(folder: Path) -> None:
    assert HeldOutFolder(path=folder, classes=3).labelled().labels == [0, 0, 1, 1, 2, 2]
    few = HeldOutFolder(path=folder, classes=3, single=3).labelled()
    assert few.labels == [0, 1, 2]
    assert [image.shape for image in few.images[1:]] == [(4, 6, 3), (4, 8, 3)]
    assert np.array_equal(few.images[0], FolderLabels(folder, 3)[0]["image"])


def test_a_batch_of_labelled_pictures(folder: Path) -> None:
    data = FolderLabels(folder, classes=3)
    batch = LabelCollator(Squash(8))([data[0], data[3]])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["labels"].equal(torch.tensor([0, 1]))
    assert batch["keys"] == ["a/0.png", "b/deep/1.png"]
    blank = LabelCollator(Squash(8)).blank(5)
    assert {name: (t.shape[0], t.dtype) for name, t in blank.items()} == {
        n: (5, batch[n].dtype) for n in ("pixel_values", "labels")
    }


def test_augmentation_follows_the_draw_of_a_sample() -> None:
    data, collate = SceneLabels(seed=0, classes=48, image_size=32), LabelCollator(RandomCrop(16, flip=True))
    first, again, other, plain = (
        collate([data[0] | draw])["pixel_values"] for draw in ({"draw": (0, 1)}, {"draw": (0, 1)}, {"draw": (0, 2)}, {})
    )
    assert first.equal(again)
    assert not first.equal(other)
    assert not first.equal(plain)
