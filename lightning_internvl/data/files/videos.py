"""Videos from files: animated pictures, folders of frames, and with PyAV any other format.

Letters: F frames, H, W sides in pixels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageSequence

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.images import IMAGE_SUFFIXES, MAX_PIXELS, is_image_file, opened_image, read_image, to_rgb

FOLDER_FPS = 2.0  # of a folder of frames, which are taken to be chosen already
ANIMATED = {".gif", ".webp", ".png", ".apng"}
MAX_BYTES = 4 * 2**30  # of all frames of a video
ANIMATION_BYTES = 2**30  # of all frames of an animated picture, of which a few bytes may stand for a thousand
# Playlists and the like name other files and addresses, which FFmpeg would open.
FROM_THE_FILE_ALONE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,ivf,m4v,mxf,rm,swf,gif,apng",
}


def read_video(path: Path, most: int | None = None) -> tuple[np.ndarray, float]:
    """Frames (F, H, W, 3) uint8, and how many there are in a second.

    Args:
        path: an animated GIF, WebP or PNG; a folder whose pictures are frames in the order of their
            names, two a second; or, with PyAV, any format that it reads.
        most: at most so many frames, the middles of as many equal parts; of a format that PyAV
            reads only these are held in memory. None: all.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_image_file(file))
        if not files:
            raise ValueError(f"{path}: the folder holds no frames ({', '.join(IMAGE_SUFFIXES)})")
        frames, rate = read_frames([files[place] for place in sorted(chosen_frames(len(files), most))])
        return frames, rate * len(frames) / len(files)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such video")
    if path.suffix.lower() in ANIMATED:
        frames, rate = _read_animation(path)
        chosen = frames[sorted(chosen_frames(len(frames), most))]
        return chosen, rate * len(chosen) / max(1, len(frames))
    if importlib.util.find_spec("av") is None:
        raise ValueError(
            f"{path}: reading {path.suffix} needs PyAV (pip install -r requirements-video.txt); "
            "GIF, WebP and folders of frames need nothing"
        )
    return _decode_video(path, most)


def read_frames(files: Sequence[Path]) -> tuple[np.ndarray, float]:
    """Pictures in their order as a video, two a second. Raises ValueError naming the first one
    where their sizes differ, and one that cannot be read."""
    frames = [read_image(file) for file in files]
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"{files[0]}: the frames differ in size")
    return np.stack(frames), FOLDER_FPS


def _read_animation(path: Path) -> tuple[np.ndarray, float]:
    with opened_image(path) as opened:
        count = getattr(opened, "n_frames", 1)
        if opened.width * opened.height * 3 * count > ANIMATION_BYTES:
            raise _too_large(path, ANIMATION_BYTES)
        frames, read, milliseconds = np.empty((count, opened.height, opened.width, 3), np.uint8), 0, 0.0
        for frame in islice(ImageSequence.Iterator(opened), count):
            frames[read] = to_rgb(frame)
            milliseconds += frame.info.get("duration", 0)
            read += 1
    return frames[:read], 1000 * read / milliseconds if milliseconds > 0 else FOLDER_FPS


def _decode_video(path: Path, most: int | None) -> tuple[np.ndarray, float]:
    import av

    frames, shape, size, read = bytearray(), (0, 0), 0, 0
    try:
        with av.open(str(path.absolute()), options=FROM_THE_FILE_ALONE) as container:
            stream = container.streams.video[0]
            size = stream.width * stream.height
            places = None if most is None else chosen_frames(_count_frames(path, stream), most)
            if size > MAX_PIXELS or size * 3 * (stream.frames if places is None else len(places)) > MAX_BYTES:
                raise _too_large(path)
            for frame in container.decode(stream):
                read += 1
                if places is not None and read - 1 not in places:
                    continue
                shape = shape if frames else (frame.height, frame.width)
                if (frame.height, frame.width) != shape:
                    raise ValueError("its frames differ in size")
                if frame.height * frame.width > MAX_PIXELS or len(frames) > MAX_BYTES:
                    raise _too_large(path)
                frames += frame.to_ndarray(format="rgb24").data
            rate = float(stream.average_rate or FOLDER_FPS)
    except BadSample:
        raise
    except Exception as error:  # FFmpeg and its wrapper raise errors of many kinds
        raise ValueError(f"{path}: damaged, or no video: {error}") from error
    if not frames:
        raise ValueError(f"{path}: the video has no frames")
    found = np.frombuffer(frames, np.uint8).reshape(-1, *shape, 3)
    return found, rate * len(found) / read


def _count_frames(path: Path, stream: Any) -> int:
    """How many frames a video has: as its header says or, where it does not, by its packets."""
    import av

    if stream.frames:
        return stream.frames
    with av.open(str(path.absolute()), options=FROM_THE_FILE_ALONE) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def frame_places(frames: int, wanted: int) -> list[int]:
    """The middles of equal parts; of one the middle frame; a short video repeats some."""
    return [int((part + 0.5) * frames / wanted) for part in range(wanted)]


def chosen_frames(total: int, most: int | None) -> set[int]:
    """The places of at most so many of some frames, see `frame_places`."""
    return set(range(total) if most is None or most >= total else frame_places(total, most))


def _too_large(path: Path, most: int = MAX_BYTES) -> BadSample:
    limits = f"{most / 2**30:.0f} GiB in all, or one more than {MAX_PIXELS} px"
    return BadSample(f"{path}: its frames take more than {limits}; cut it or make it smaller", "large video")
