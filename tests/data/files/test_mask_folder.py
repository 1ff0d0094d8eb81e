"""Pictures with a class for every pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.files.mask_folder import IGNORED, read_mask_folder
from lightning_internvl.data.scenes.generator import Scenes
from lightning_internvl.data.scenes.masks import SCENE_CLASSES, scene_masks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures as ADE20K keeps them: 0 is nothing, 1 and 2 are classes."""
    for kind in ("images", "annotations"):
        (tmp_path / kind / "validation").mkdir(parents=True)
    for place in range(2):
        Image.new("RGB", (6, 4), (place, 0, 0)).save(tmp_path / f"images/validation/p{place}.png")
        mask = np.tile(np.array([0, 1, 2], dtype=np.uint8), (4, 2))
        Image.fromarray(mask).save(tmp_path / f"annotations/validation/p{place}.png")
    return tmp_path


def test_classes_of_a_folder(folder: Path) -> None:
    data = read_mask_folder(folder, "validation", classes=2)
    assert (len(data.images), data.total) == (2, 2)
    assert data.mask(0)[0].tolist() == [IGNORED, 0, 1, IGNORED, 0, 1]
    assert data.images[1][0, 0].tolist() == [1, 0, 0]
    plain = read_mask_folder(folder, "validation", classes=3, reduce_zero_label=False, samples=1)
    assert plain.mask(0)[0].tolist() == [0, 1, 2, 0, 1, 2]
    assert (len(plain.images), plain.total) == (1, 2)
    with pytest.raises(ValueError, match=r"p0.png holds the class 2, but classes=1"):
        read_mask_folder(folder, "validation", classes=1).mask(0)


def test_folders_that_are_not_whole(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is not kept as ADE20K is: the folder .*images/training does not exist"):
        read_mask_folder(folder, "training", classes=2)
    Image.new("RGB", (6, 4)).save(folder / "annotations/validation/p1.png")
    with pytest.raises(ValueError, match=r"p1.png holds colours \(RGB\), not the numbers of classes"):
        read_mask_folder(folder, "validation", classes=2).mask(1)
    (folder / "annotations/validation/p1.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"annotations/validation/p1.png cannot be read"):
        read_mask_folder(folder, "validation", classes=2).mask(1)
    (folder / "annotations/validation/p0.png").unlink()
    with pytest.raises(ValueError, match=r"images/validation/p0.png has no annotation: .*p0.png does not exist \(1 of 2"):
        read_mask_folder(folder, "validation", classes=2)


@pytest.mark.parametrize("tag", range(2, 9))
def test_a_mask_lies_on_a_picture_that_its_tag_turns(folder: Path, tag: int) -> None:
    """The picture is read upright; its mask was drawn on what the file holds, or upright."""
    stored, exif = np.zeros((4, 6, 3), dtype=np.uint8), Image.Exif()
    stored[0, :2] = stored[1, 0] = 255
    exif[0x0112] = tag
    Image.fromarray(stored).save(folder / "images/validation/p0.png", exif=exif)
    drawn = Image.fromarray((stored[..., 0] > 0).astype(np.uint8))
    drawn.save(folder / "annotations/validation/p0.png")
    if tag < 5:
        with pytest.raises(ValueError, match=r"p0\.png is turned by its EXIF tag, .* save the picture upright"):
            read_mask_folder(folder, "validation", 2, reduce_zero_label=False)
        return
    for _ in range(2):
        data = read_mask_folder(folder, "validation", 3, reduce_zero_label=False)
        assert np.array_equal(data.images[0][..., 0] > 0, data.mask(0) == 1)
        Image.fromarray(data.mask(0)).save(folder / "annotations/validation/p0.png")  # upright


def test_a_mask_of_another_size_is_named_at_once(folder: Path) -> None:
    Image.new("L", (5, 4)).save(folder / "annotations/validation/p1.png")
    with pytest.raises(ValueError, match=r"p1\.png has 6 x 4 px, but its annotation .*p1\.png 5 x 4"):
        read_mask_folder(folder, "validation", classes=2)


def test_masks_of_scenes_are_where_the_things_are() -> None:
    scenes = Scenes(0, "scenes", 96)
    data = scene_masks(scenes, 5)
    for place in range(5):
        scene, mask = scenes.scene(place), data.mask(place)
        assert set(np.unique(mask)) == {0, *(thing + 1 for thing in scene.counts)}
        assert mask.max() < SCENE_CLASSES
        image, background = data.images[place].astype(int), np.array(scene.rgb)
        assert np.abs(image[mask == 0] - background).mean() < 12  # soft edges of the artwork are left there
        for placed in scene.objects:
            x0, y0, x1, y1 = (round(value * 96) for value in placed.box)
            assert (mask[y0:y1, x0:x1] == placed.thing + 1).mean() > 0.15
