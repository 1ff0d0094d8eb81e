"""Videos from files: animated pictures, folders of frames, and with PyAV any other format.

Letters: F frames, H, W sides in pixels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from lightning_internvl.data.files.images import IMAGE_SUFFIXES, is_image_file, read_image

FOLDER_FPS = 2.0  # of a folder of frames, which are taken to be chosen already
ANIMATED = {".gif", ".webp", ".png", ".apng"}
MAX_BYTES = 4 * 2**30  # of all frames of a video


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """All frames (F, H, W, 3) uint8, and how many there are in a second.

    Args:
        path: an animated GIF, WebP or PNG; a folder whose pictures are frames in the order of their
            names, two a second; or, with PyAV, any format that it reads.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_image_file(file))
        if not files:
            raise ValueError(f"{path}: the folder holds no frames ({', '.join(IMAGE_SUFFIXES)})")
        return read_frames(files)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such video")
    if path.suffix.lower() in ANIMATED:
        return _read_animation(path)
    if importlib.util.find_spec("av") is None:
        raise ValueError(
            f"{path}: reading {path.suffix} needs PyAV (pip install -r requirements-video.txt); "
            "GIF, WebP and folders of frames need nothing"
        )
    return _decode_video(path)


def read_frames(files: Sequence[Path]) -> tuple[np.ndarray, float]:
    """Pictures in their order as a video, two a second. Raises ValueError naming the first one
    where their sizes differ, and one that cannot be read."""
    frames = [read_image(file) for file in files]
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"{files[0]}: the frames differ in size")
    return np.stack(frames), FOLDER_FPS


def _read_animation(path: Path) -> tuple[np.ndarray, float]:
    try:
        with Image.open(path) as opened:
            frames, milliseconds = [], 0.0
            if opened.width * opened.height * 3 * getattr(opened, "n_frames", 1) > MAX_BYTES:
                raise _too_large(path)
            for frame in ImageSequence.Iterator(opened):
                frames.append(np.array(frame.convert("RGB")))
                milliseconds += frame.info.get("duration", 0)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: damaged, or no picture: {error}") from error
    return np.stack(frames), 1000 * len(frames) / milliseconds if milliseconds else FOLDER_FPS


def _decode_video(path: Path) -> tuple[np.ndarray, float]:
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames, size = [], 0
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                size += frames[-1].nbytes
                if size > MAX_BYTES:
                    raise _too_large(path)
            rate = float(stream.average_rate or FOLDER_FPS)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: damaged, or no video: {error}") from error
    if not frames:
        raise ValueError(f"{path}: the video has no frames")
    return np.stack(frames), rate


def _too_large(path: Path) -> ValueError:
    most = f"{MAX_BYTES / 2**30:.0f} GiB"
    return ValueError(f"{path}: its frames take more than {most}; cut it or make it smaller")
