"""Where the pictures and videos of a record are: paths, bytes, base64, lists of frames."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.frame_times import TIMES, timed_frames
from lightning_internvl.data.files.images import IMAGE_SUFFIXES
from lightning_internvl.data.files.record_fields import Fields
from lightning_internvl.messages import first_of

# Keys of pictures and videos, beside a conversation, of a message or of a part
IMAGES = (
    "image", "images", "image_path", "file_name", "filepath", "img", "imgs", "image_paths", "img_path", "img_paths", "image_file",
    "image_files", "picture", "pictures",
)  # fmt: skip
VIDEOS = ("video", "videos", "video_path", "video_paths")
URLS = ("http:", "https:", "s3:", "gs:", "hf:", "ftp:")
# How base64 of JPEG, PNG, WebP, GIF and TIFF files begins
BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "SUkqA", "TU0AK")
LEAST_BASE64 = 80  # characters; no path is so long and begins so
STILLS = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".gif")

Frames = tuple[str, ...]  # paths of the frames of a video, in order
Picture = str | bytes  # a path, or the bytes of a file
Source = Picture | Frames  # of a picture or a video


def read_pictures(given: Any) -> list[Picture]:
    """The pictures of a field: none, one or a list of them, which may be JSON. Raises BadSample."""
    return [_source(one, "picture") for one in _listed(given)]


def read_videos(given: Any, several: bool = False) -> list[Source]:
    """The videos of a field: none, a path, or a list: of the frames of one video if it holds still
    pictures, else of videos, each of them a path or a list of frames.

    Args:
        several: whether the field may hold several videos ("videos"), so that pictures with a name
            that an animation may have (.png, .webp) are videos of their own.
    """
    found = _listed(given)
    stills = [suffix for suffix in STILLS if not several or suffix in (".jpg", ".jpeg", ".bmp")]
    if (
        found
        and all(isinstance(one, str) and _suffix(one) in stills for one in found)
        and (len(found) > 1 or isinstance(given, list))
    ):
        return [tuple(str(_source(one, "frame")) for one in found)]
    return [_video(one) for one in found]


def pictures_of(fields: Fields) -> list[Picture]:
    """The pictures beside a conversation, a message or a caption. A name beside the bytes of a file
    says no more. Raises BadSample, also where two keys name different pictures."""
    found = read_pictures(fields.take(*IMAGES))
    if found and not any(isinstance(one, str) for one in found):
        fields.asked.update(name for name in IMAGES if isinstance(fields.given.get(name), str))
    _check_one_voice(fields, IMAGES)
    return found


def videos_of(fields: Fields) -> list[Source]:
    """The videos likewise, lists of frames with their `timestamps` where there are some."""
    found = read_videos(fields.take(*VIDEOS), several=fields.has("videos", "video_paths"))
    _check_one_voice(fields, VIDEOS)
    return timed_frames(found, fields.take(TIMES)) if found and fields.has(TIMES) else found


def _check_one_voice(fields: Fields, names: Sequence[str]) -> None:
    """Raises BadSample for two keys that name different files; their folders may be written in two
    ways."""
    given = [name for name in names if name in fields.given]
    if len(given) < 2:
        return
    said = [(name, files) for name in given if (files := _file_names(fields.given[name]))]
    for name, files in said[1:]:
        if files != said[0][1]:
            raise BadSample(
                f"{said[0][0]!r} and {name!r} name different files: {first_of(said[0][1])} and {first_of(files)}; keep one key",
                "placeholders",
            )
        fields.asked.add(name)


def _file_names(given: Any) -> list[str]:
    """The files that a field names, without their folders; none if it holds anything else."""
    paths = given if isinstance(given, list) else [given]
    named = all(isinstance(path, str) and _suffix(path) for path in paths)
    return [PurePosixPath(path.replace("\\", "/")).name for path in paths] if named else []


def looks_like_path(text: str) -> bool:
    """Whether a text names a picture: a file by its ending, a URL or base64."""
    return _suffix(text) in IMAGE_SUFFIXES or text.startswith((*URLS, "data:", "file:", *BASE64))


def _video(given: Any) -> Source:
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        frames = tuple(_source(one, "frame") for one in given)
        if not frames or not all(isinstance(frame, str) for frame in frames):
            raise BadSample("the frames of a video are a list of paths of pictures", "video")
        return tuple(map(str, frames))
    return _source(given, "video")


def _listed(given: Any) -> list[Any]:
    if given is None or (isinstance(given, str | list) and not given):
        return []
    if isinstance(given, str) and given.startswith("[") and given.rstrip().endswith("]"):
        given = from_json(given, "a list of paths")
    return given if isinstance(given, list) else [given]


def from_json(text: str, what: str) -> Any:
    """The value of a field that holds JSON as a text, as tables do. Raises BadSample."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        python = (
            "; this is a list as Python prints it: write it with json.dumps" if text.lstrip().startswith(("[{'", "['")) else ""
        )
        raise BadSample(f"neither {what} nor its JSON: {text!r:.100}{python}", "unknown format") from error


def _source(given: Any, what: str) -> Picture:
    if isinstance(given, Mapping):  # of a Hugging Face data set, or of a chat service
        given = next((given[name] for name in ("bytes", "path", "url", "base64", "data", "image") if given.get(name)), None)
    if isinstance(given, bytes | bytearray):
        return bytes(given)
    if not isinstance(given, str) or not given.strip():
        kind = "missing image" if what in ("picture", "frame") else f"missing {what}"
        raise BadSample(f"{given!r:.100} is no path of a {what}", kind)
    if given.startswith("data:") or (given.startswith(BASE64) and len(given) >= LEAST_BASE64 and "." not in given):
        return _decoded(given, what)
    if given.startswith(URLS):
        advice = f"only files are read: download the {what} and put its path into the record"
        raise BadSample(f"{given:.100} is a URL; {advice}", "URL")
    path = given.removeprefix("file://")
    return path.replace("\\", "/") if "\\" in path else path


def _decoded(given: str, what: str) -> bytes:
    """The bytes of base64, with or without the head of a data URL."""
    head, comma, content = given.partition(",") if given.startswith("data:") else ("", ",", given)
    if not comma or (head and not head.endswith(";base64")):
        raise BadSample(f"{given[:60]!r} is no {what} in base64: 'data:image/png;base64,...'", "unreadable image")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(
            f"its {what} in base64, {len(content)} characters from {content[:20]!r} on, is damaged: {error}", "unreadable image"
        ) from error


def _suffix(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/").rpartition("/")[2]).suffix.lower() if len(path) < 4096 else ""
