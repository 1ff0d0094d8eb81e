"""Videos with a class each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.files.video_lists import read_video_list
from lightning_internvl.data.files.videos import frame_places
from lightning_internvl.data.scenes.videos import scene_videos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of frames and an animated picture."""
    (tmp_path / "frames").mkdir()
    frames = [Image.new("RGB", (8, 6), (40 * place, 0, 0)) for place in range(4)]
    for place, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{place}.png")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nframes,riding a_bike\nmoving.gif,dancing\n",
        "frames,riding a_bike\nmoving.gif,dancing\n",
        "label,path\nriding a_bike,frames\ndancing,moving.gif\n",
    ],
)
def test_lists_of_names(folder: Path, text: str) -> None:
    (folder / "val.csv").write_text(text)
    data = read_video_list(folder / "val.csv")
    assert (data.names, data.labels, data.total) == (["dancing", "riding a bike"], [1, 0], 2)
    assert [video.shape for video in data.videos] == [(4, 6, 8, 3)] * 2
    assert data.videos[0][:, 0, 0, 0].tolist() == [0, 40, 80, 120]


def test_lists_of_numbers(folder: Path) -> None:
    (folder / "val.txt").write_text("frames 2\nmoving.gif 0\n")
    (folder / "names.txt").write_text("dancing\njumping\nriding a bike\n")
    data = read_video_list(folder / "val.txt", names=folder / "names.txt")
    assert (data.names, data.labels) == (["dancing", "jumping", "riding a bike"], [2, 0])
    few = read_video_list(folder / "val.txt", videos=folder, names=folder / "names.txt", samples=1)
    assert (len(few.videos), few.labels, few.total) == (1, [2], 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\nframes,a\nmoving.gif,\n", "val.csv: line 3 lacks a path or a label"),
        ("path,label\nframes,a\nmoving.gif,a\n", "lists one class; classes are told apart from two on"),
        (
            "path,label\nnowhere.mp4,a\nmoving.gif,b\n",
            r"the video nowhere.mp4 is not in .*; say where .* with videos=FOLDER",
        ),
        ("path,label\n", "lists no video"),
        ("", "val.csv is empty"),
    ],
)
def test_faults_of_lists(folder: Path, text: str, message: str) -> None:
    (folder / "val.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_video_list(folder / "val.csv")


def test_a_label_that_is_no_class(folder: Path) -> None:
    (folder / "val.csv").write_text("frames,0\nmoving.gif,7\n")
    (folder / "names.txt").write_text("dancing\njumping\n")
    with pytest.raises(ValueError, match=r"val.csv: line 2: '7' is no class of .*names.txt"):
        read_video_list(folder / "val.csv", names=folder / "names.txt")


def test_frames_lie_in_the_middles_of_equal_parts() -> None:
    assert frame_places(300, 1) == [150]
    assert frame_places(16, 8) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert frame_places(3, 8) == [0, 0, 0, 1, 1, 2, 2, 2]


def test_videos_of_scenes_show_one_thing_in_every_quarter() -> None:
    data = scene_videos(0, 32, ("twemoji", "openmoji"), 50)
    assert (data.labels[:3], data.labels[48]) == ([0, 1, 2], 0)
    video = data.videos[1]
    assert video.shape == (16, 32, 32, 3)
    assert np.array_equal(video, scene_videos(0, 32, ("twemoji", "openmoji"), 2).videos[1])
    quarters = [video[:, y : y + 16, x : x + 16].reshape(16, -1) for y in (0, 16) for x in (0, 16)]
    shown = [sum(bool(frame.astype(int).reshape(-1, 3).std(axis=0).max() > 1) for frame in quarter) for quarter in quarters]
    assert shown == [4, 4, 4, 4]
