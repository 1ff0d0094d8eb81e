"""The seconds at which the frames of a video stand, where a record says them (`timestamps`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_internvl.data.bad_samples import BadSample

TIMES = "timestamps"


class TimedFrames(tuple[str, ...]):
    """Paths of the frames of a video, with the second of each in `seconds`."""

    seconds: tuple[float, ...]


class TimedRate(float):
    """Frames a second on the whole, with the second of each frame in `seconds`."""

    seconds: tuple[float, ...]


def timed_frames(videos: Sequence[Any], given: Any) -> list[Any]:
    """Videos of a record with their times, a list of numbers for each, or one for a single video.

    Raises:
        BadSample: for times of another number than frames, of a video that is no list of frames, or
            that are no numbers or do not go on.
    """
    listed = given if isinstance(given, list) else [given]
    each = listed if listed and all(isinstance(one, list) for one in listed) else [listed]
    if len(each) != len(videos):
        raise BadSample(f"{len(each)} lists of {TIMES} for {len(videos)} videos; give one for each", "video")
    return [_timed(video, times) for video, times in zip(videos, each, strict=True)]


def rate_of(frames: TimedFrames) -> TimedRate:
    """How many frames there are in a second."""
    seconds = frames.seconds
    rate = TimedRate((len(seconds) - 1) / (seconds[-1] - seconds[0]) if len(seconds) > 1 else 1.0)
    rate.seconds = seconds
    return rate


def _timed(frames: Any, times: list[Any]) -> TimedFrames:
    if not isinstance(frames, tuple):
        raise BadSample(f"{TIMES} are of a list of frames, and the video is {frames!r:.100}", "video")
    if len(times) != len(frames) or any(isinstance(time, bool) or not isinstance(time, int | float) for time in times):
        raise BadSample(f"{TIMES}={times!r:.100} must be {len(frames)} numbers, the second of each frame", "video")
    if fault := times_fault(times, strictly=True):
        raise BadSample(f"{TIMES} {fault}", "video")
    found = TimedFrames(frames)
    found.seconds = tuple(map(float, times))
    return found


def times_fault(times: Sequence[float], strictly: bool = False) -> str | None:
    """What is wrong with seconds of which each must stand behind the one before, or beside it."""
    before = 0.0
    for place, time in enumerate(times):
        if not before <= time < float("inf") or (strictly and place and time == before):
            return f"{list(times)[:8]}: {time} comes after {before}, and times must go on"
        before = time
    return None
