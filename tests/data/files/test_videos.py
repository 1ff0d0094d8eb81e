"""Videos from files, and conversations about them."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.datasets import ChatsFile
from lightning_internvl.data.files.videos import read_video

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def frames(size: tuple[int, int] = (8, 6)) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in COLOURS]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_pictures(tmp_path: Path, suffix: str) -> None:
    first, *rest = frames()
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=rest, duration=100, **options)
    video, fps = read_video(tmp_path / f"a.{suffix}")
    assert fps == pytest.approx(10)
    assert np.array_equal(video, np.stack([np.asarray(frame) for frame in frames()]))


def test_a_still_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    frames()[0].save(tmp_path / "a.png")
    video, fps = read_video(tmp_path / "a.png")
    assert video.shape == (1, 6, 8, 3)
    assert fps == 2.0


def test_a_folder_of_frames_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number, frame in enumerate(frames()):
        frame.save(tmp_path / f"{2 - number:03}.png")
    video, fps = read_video(tmp_path)
    assert fps == 2.0
    assert video[:, 0, 0].tolist() == [list(colour) for colour in COLOURS[::-1]]
    Image.new("RGB", (3, 3)).save(tmp_path / "z.png")
    with pytest.raises(ValueError, match="the frames differ in size"):
        read_video(tmp_path)


def test_an_mp4(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="mp4 needs PyAV: pip install -r requirements-video.txt")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames((64, 48)):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    video, fps = read_video(tmp_path / "a.mp4")
    assert (video.shape, video.dtype, fps) == ((3, 48, 64, 3), np.uint8, 5.0)
    assert np.abs(video.mean(axis=(1, 2)) - np.array(COLOURS)).max() < 12  # it is a lossy format
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"b\.mp4: damaged, or no video"):
        read_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_cut_animations_are_named_or_shorter(tmp_path: Path, suffix: str) -> None:
    first, *rest = [Image.effect_noise((16, 12), 90 + n).convert("RGB") for n in range(4)]
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=rest, duration=100)
    content, named = (tmp_path / f"a.{suffix}").read_bytes(), 0
    for length in range(0, len(content), max(len(content) // 40, 1)):
        (tmp_path / f"b.{suffix}").write_bytes(content[:length])
        try:
            count = len(read_video(tmp_path / f"b.{suffix}")[0])
        except BadSample:
            named += 1
        else:
            assert 1 <= count <= 4
    assert named > 5


def test_an_animation_that_says_it_has_many_gigabytes_is_named_at_once(tmp_path: Path) -> None:
    first, *rest = frames()
    first.save(tmp_path / "a.png", save_all=True, append_images=rest)
    content = (tmp_path / "a.png").read_bytes()
    said = b"acTL" + struct.pack(">II", 2**30, 0)  # how many frames there are
    content = content.replace(b"acTL" + struct.pack(">II", 3, 0), said)
    place = content.index(said) + len(said)
    (tmp_path / "a.png").write_bytes(content[:place] + struct.pack(">I", zlib.crc32(said)) + content[place + 4 :])
    with pytest.raises(ValueError, match=r"a\.png: its frames take more than 1 GiB"):
        read_video(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4"])
def test_a_playlist_opens_no_other_file(tmp_path: Path, name: str) -> None:
    av = pytest.importorskip("av", reason="mp4 needs PyAV: pip install -r requirements-video.txt")
    with av.open(str(tmp_path / "other.ts"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(frames((64, 48))[0])))
        container.mux(stream.encode(None))
    assert len(read_video(tmp_path / "other.ts")[0]) == 1
    (tmp_path / name).write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="damaged, or no video"):
        read_video(tmp_path / name)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gif").write_bytes(b"GIF89a")
    (tmp_path / "a.mp4").write_bytes(b"")
    for name, message in (
        ("empty", "holds no frames"),
        ("no.gif", "there is no such video"),
        ("bad.gif", "damaged"),
        ("a.mp4", ""),
    ):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + f".*{message}"):
            read_video(tmp_path / name)


def test_conversations_about_videos(tmp_path: Path) -> None:
    first, *rest = frames()
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=500)
    first.save(tmp_path / "b.png")
    turns = [{"from": "human", "value": "what changes?"}, {"from": "gpt", "value": "the colour"}]
    marked = [{"from": "human", "value": "<image> and <video>"}, {"from": "gpt", "value": "red"}]
    records = [
        {"video": "a.gif", "conversations": turns},
        {"image": "b.png", "videos": ["a.gif"], "conversations": marked},
        {"videos": ["a.gif", "a.gif"], "conversations": [{"from": "human", "value": "<video>"}, turns[1]]},
    ]
    (tmp_path / "chats.json").write_text(json.dumps(records))
    chats = ChatsFile(tmp_path / "chats.json")
    assert chats[0]["conversation"][0]["content"] == "<video>\nwhat changes?"
    assert chats[0]["images"] == []
    video, fps = chats[0]["videos"][0]
    assert video.shape == (3, 6, 8, 3)
    assert fps == pytest.approx(2)
    assert len(chats[1]["images"]) == len(chats[1]["videos"]) == 1
    with pytest.raises(ValueError, match="2 videos but 1 '<video>' marks"):
        chats[2]
