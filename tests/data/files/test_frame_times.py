"""Frames of a video whose record says the second of each: to the times in the text, or refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.conversations import read_entry
from lightning_internvl.data.files.datasets import ChatsFile
from lightning_internvl.data.files.frame_times import TimedFrames
from lightning_internvl.data.processors.any_resolution import AnyResolution

FRAMES, TIMES = ["a.png", "b.png", "c.png"], [0.0, 4, 10.0]
ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat"}]


def record(**changes: Any) -> dict[str, Any]:
    return {"video": FRAMES, "timestamps": TIMES, "messages": ASKED} | changes


def of_a_part(**changes: Any) -> dict[str, Any]:
    part = {"type": "video", "video": FRAMES, "timestamps": TIMES} | changes
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, ASKED[1]]}


@pytest.mark.parametrize(
    "given", [record(), of_a_part(), record(videos=[FRAMES], timestamps=[TIMES], video=None)], ids=["record", "part", "lists"]
)
def test_times_come_with_the_frames(given: dict[str, Any]) -> None:
    entry = read_entry(given)
    assert entry.videos == [tuple(FRAMES)]
    for video in (entry.videos[0], pickle.loads(pickle.dumps(entry.videos[0]))):
        assert isinstance(video, TimedFrames)
        assert video.seconds == (0.0, 4.0, 10.0)
    assert entry.unread == []


def test_times_reach_the_processor(tmp_path: Path) -> None:
    for name in FRAMES:
        Image.new("RGB", (56, 56)).save(tmp_path / name)
    (tmp_path / "x.jsonl").write_text(json.dumps(record()))
    ((frames, rate),) = ChatsFile(tmp_path / "x.jsonl")[0]["videos"]
    assert (len(frames), rate) == (3, 0.2)
    processor = AnyResolution(112, min_frames=1)
    assert processor.video(frames, rate).shape[0] == 2
    assert processor.step_times(3, rate) == [5.0]  # of two frames, the first and the last
    assert processor.step_times(3, 0.2) == [5.0]
    uneven = AnyResolution(112, frames=1).step_times(3, rate)
    assert uneven == [0.0, 4.0, 10.0]
    assert np.allclose(AnyResolution(112, frames=1).step_times(3, 0.2), [0.0, 5.0, 10.0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timestamps": [0.0, 10.0, 4.0]}, r"timestamps \[0\.0, 10\.0, 4\.0\]: 4\.0 comes after 10\.0, and times must go on"),
        ({"timestamps": [0.0, 4.0, 4.0]}, r"4\.0 comes after 4\.0"),
        ({"timestamps": [-1.0, 4.0, 5.0]}, r"-1\.0 comes after 0\.0"),
        ({"timestamps": [0.0, 4.0]}, r"timestamps=\[0\.0, 4\.0\] must be 3 numbers, the second of each frame"),
        ({"timestamps": [0.0, None, 4.0]}, "must be 3 numbers"),
        ({"timestamps": 3.0}, r"timestamps=\[3\.0\] must be 3 numbers"),
        ({"timestamps": [TIMES, TIMES]}, "2 lists of timestamps for 1 videos; give one for each"),
        ({"video": "a.mp4"}, "timestamps are of a list of frames, and the video is 'a.mp4'"),
    ],
)
@pytest.mark.parametrize("make", [record, of_a_part])
def test_times_that_do_not_fit(make: Any, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BadSample, match=named):
        read_entry(make(**changes))
