"""What a record of a user's file says, whatever its format: messages with marks, and the pictures
and videos that they stand for.

Formats are recognised by the names in the record:
- LLaVA, ShareGPT, InternVL: {"conversations": [{"from": "human" or "gpt", "value": text}],
  "image": path or [paths]}
- messages, as Hugging Face has them: {"messages": [{"role": ..., "content": text or [parts]}],
  "images": [paths]}; a part is {"type": "text", "text": ...} or {"type": "image" or "video"}, with
  a path of its own or without
- a picture and its caption: {"image": path, "caption": text}

Where no mark shows the places of the pictures, they stand before the first question. Nothing is
read but the record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.templates import IMAGE, VIDEO, Message

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGES = ("image", "images", "image_path", "file_name", "filepath")
VIDEOS = ("video", "videos")
CAPTIONS = ("caption", "text")
URLS = ("http:", "https:", "s3:", "gs:", "hf:", "ftp:", "data:")
CAPTION_REQUEST = "Describe the image briefly."
BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
LARGEST = 1000  # of the numbers of a box
MAX_CAPTION = 65_536  # characters; what is longer is no caption, but a page or a fault of the list

Source = str | bytes  # of a picture or video: a path, or the bytes of a file
# A mark, and what it stands for; None where the record lists it elsewhere
MarkSource = tuple[str, Source | None]
MarkedMessage = tuple[Message, list[MarkSource]]


@dataclass
class Entry:
    """A record, understood; `caption` and `language` are of a picture with a caption."""

    messages: list[Message] = field(default_factory=list)
    images: list[Source] = field(default_factory=list)
    videos: list[Source] = field(default_factory=list)
    caption: str | None = None
    language: str | None = None


def read_entry(record: Mapping[str, Any], caption_request: str = CAPTION_REQUEST) -> Entry:
    """What a record says.

    Args:
        caption_request: the question that a bare caption answers.

    Raises:
        BadSample: for an unknown format, a role that is none, a conversation without an answer or
            with an empty one, pictures and marks that differ in number, a URL, a box outside its
            picture.
    """
    if "conversations" in record:
        return _read_conversation(record, record["conversations"], "from", "value")
    if "messages" in record:
        return _read_conversation(record, record["messages"], "role", "content")
    return _read_pair(record, caption_request)


def _read_pair(record: Mapping[str, Any], request: str) -> Entry:
    kinds = (IMAGES, CAPTIONS)
    image, caption = (next((name for name in names if name in record), None) for names in kinds)
    if image is None or caption is None:
        missing = [name for name, x in (("image", image), ("caption", caption)) if x is None]
        raise BadSample(
            "neither a conversation ('conversations' or 'messages') nor a record with image and "
            f"caption: {' and '.join(missing)} missing among {sorted(map(str, record))}",
            "unknown format",
        )
    text = str(record[caption] or "").strip()
    check_length(text)
    images = _sources(record[image], "picture")
    if not images or not text:
        raise BadSample(f"the {caption if images else image} is empty", "empty caption" if images else "missing image")
    if len(images) > 1:
        raise BadSample(f"a caption has one picture, not {len(images)}", "placeholders")
    if IMAGE in text:
        raise BadSample(f"the caption contains {IMAGE!r}", "placeholders")
    check_boxes(text)
    messages: list[Message] = [{"role": "user", "content": f"{IMAGE}\n{request}"}, {"role": "assistant", "content": text}]
    return Entry(messages, images, [], text, record.get("language") or None)


def _read_conversation(record: Mapping[str, Any], turns: Any, role: str, text: str) -> Entry:
    if not isinstance(turns, list):
        raise BadSample(f"not a list of messages: {turns!r:.200}", "unknown format")
    said = _trim_to_answers([_read_message(turn, role, text) for turn in turns])
    messages = [message for message, _ in said]
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadSample(f"answer {place} is empty", "empty answer")
        if message["role"] == "assistant" and IMAGE in message["content"]:
            raise BadSample(f"answer {place} contains {IMAGE!r}", "placeholders")
        check_boxes(message["content"])
    images, videos = (
        _in_order_of_marks(
            _sources(next((record[name] for name in names if record.get(name)), None), what[:-1]),
            [source for _, shown in said for found, source in shown if found == mark],
            messages,
            mark,
            what,
        )
        for names, mark, what in ((IMAGES, IMAGE, "pictures"), (VIDEOS, VIDEO, "videos"))
    )
    return Entry(messages, images, videos)


def _read_message(turn: Any, role: str, text: str) -> MarkedMessage:
    """One message and what it shows: for each mark its path, None where the record lists it."""
    if not isinstance(turn, Mapping) or role not in turn or text not in turn:
        raise BadSample(f"not a message with {role!r} and {text!r}: {turn!r:.200}", "unknown format")
    if not isinstance(turn[role], str) or turn[role] not in ROLES:
        raise BadSample(f"role {turn[role]!r} is unknown; it must be one of {', '.join(ROLES)}", "unknown role")
    content = turn[text]
    if isinstance(content, str):
        return {"role": ROLES[turn[role]], "content": content}, _marks(content)
    if not isinstance(content, list):
        raise BadSample(f"not a text, nor a list of parts: {content!r:.200}", "unknown format")
    parts = [_read_part(part) for part in content]
    said: Message = {"role": ROLES[turn[role]], "content": "".join(part for part, _ in parts)}
    return said, [one for _, shown in parts for one in shown]


def _marks(text: str) -> list[MarkSource]:
    if "<" in text:
        return [(mark, None) for mark in (IMAGE, VIDEO) for _ in range(text.count(mark))]
    return []


def _read_part(part: Any) -> tuple[str, list[MarkSource]]:
    """A part of a message as text, and what it shows."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], _marks(part["text"])
    if kind in ("image", "image_url", "video", "video_url"):
        name, mark = ("image", IMAGE) if kind.startswith("image") else ("video", VIDEO)
        given = next((part[key] for key in (kind, name, "path", "url") if part.get(key)), None)
        given = given["url"] if isinstance(given, Mapping) and "url" in given else given
        what = "picture" if name == "image" else name
        return mark, [(mark, _source(given, what) if given else None)]
    raise BadSample(f"not a part of the type text, image or video: {part!r:.200}", "unknown format")


def _trim_to_answers(said: list[MarkedMessage]) -> list[MarkedMessage]:
    """From the first question (after a system message) to the last answer."""
    roles = [message["role"] for message, _ in said]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        raise BadSample("the conversation has no question with an answer", "no answer")
    system = said[:1] if roles[0] == "system" else []
    last = len(roles) - 1 - roles[::-1].index("assistant")
    first = next(place for place in range(len(system), len(roles)) if roles[place] != "assistant")
    return [*system, *said[first : last + 1]]


def _sources(given: Any, what: str) -> list[Source]:
    """Pictures or videos of a record: none, one or a list."""
    if given is None or given in ("", []):
        return []
    return [_source(one, what) for one in (given if isinstance(given, list) else [given])]


def _source(given: Any, what: str) -> Source:
    if isinstance(given, Mapping):  # of a Hugging Face data set
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str) or not given:
        raise BadSample(f"{given!r} is no path of a {what}", "missing image" if what == "picture" else f"missing {what}")
    if given.startswith(URLS):
        advice = f"only files are read: download the {what} and put its path into the record"
        raise BadSample(f"{given:.100} is a URL; {advice}", "URL")
    return given.removeprefix("file://")


def _in_order_of_marks(
    listed: list[Source],
    own: list[Source | None],
    messages: Sequence[Message],
    mark: str,
    what: str,
) -> list[Source]:
    """The sources in the order of their marks, which else stand before the first question."""
    marks = sum(message["content"].count(mark) for message in messages)
    if listed and not marks:
        first = next(message for message in messages if message["role"] == "user")
        first["content"], own = f"{mark}\n" * len(listed) + first["content"], [None] * len(listed)
        marks = len(listed)
    if mark == VIDEO and not listed and not any(own):
        return []  # a word in angle brackets; where videos have a token, it is refused later
    given = sum(source is not None for source in own)
    if marks != len(listed) + given or marks != len(own):
        raise BadSample(f"{len(listed) + given} {what} but {marks} {mark!r} marks", "placeholders")
    rest = iter(listed)
    return [next(rest) if source is None else source for source in own]


def check_length(text: str | bytes) -> None:
    """Raises BadSample for more than MAX_CAPTION characters; bytes may be 4 times as many."""
    if len(text) > MAX_CAPTION * (4 if isinstance(text, bytes) else 1):
        what = "bytes" if isinstance(text, bytes) else "characters"
        most = f"at most {MAX_CAPTION} characters are read"
        raise BadSample(f"the caption has {len(text)} {what}; {most}", "long caption")


def check_boxes(text: str) -> None:
    """Boxes in text have numbers from 0 to 1000: "(x0,y0),(x1,y1)" or "[[x0, y0, x1, y1]]".

    Raises:
        BadSample: for a box that lies outside, has swapped corners, or is none.
    """
    if "box>" not in text:
        return
    rest = BOX.sub("", text)
    if "<box>" in rest or "</box>" in rest:
        raise BadSample(f"<box> or </box> without its other half: {text!r:.200}", "box")
    for box in BOX.findall(text):
        numbers = [float(number) for number in NUMBER.findall(box)]
        if not numbers or len(numbers) % 4:
            wrong = f"{len(numbers)} numbers, not left, top, right, bottom"
            raise BadSample(f"the box {box!r:.100} has {wrong}", "box")
        if not all(0 <= number <= LARGEST for number in numbers):
            raise BadSample(f"the box {box!r:.100} lies outside its picture (0 to {LARGEST})", "box")
        for x0, y0, x1, y1 in zip(*(numbers[i::4] for i in range(4)), strict=True):
            if x0 > x1 or y0 > y1:
                raise BadSample(f"the corners of the box {box!r:.100} are swapped; left, top comes first", "box")
