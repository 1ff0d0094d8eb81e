"""What a record of a user's file says, whatever its format: messages with marks, the pictures and
videos that they stand for, and what of the record was not read.

Formats are recognised by the names in the record (`record_formats`), marks in every published
spelling (`picture_marks`). Where no mark shows the places of the pictures, they stand before the
first question. Nothing is read but the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.boxes import check_boxes
from lightning_internvl.data.files.passages import Passages, is_query, read_passages
from lightning_internvl.data.files.picture_marks import Shown, suspects
from lightning_internvl.data.files.picture_sources import IMAGES, Picture, Source, pictures_of, videos_of
from lightning_internvl.data.files.preferences import is_preference, with_each_answer
from lightning_internvl.data.files.record_fields import Fields, is_empty
from lightning_internvl.data.files.record_formats import FORMATS, Turn, format_of, text_of
from lightning_internvl.data.templates import IMAGE, VIDEO, Message, message_of
from lightning_internvl.messages import first_of

CAPTIONS = ("caption", "text")
CAPTION_REQUEST = "Describe the image briefly."
MAX_CAPTION = 65_536  # characters; what is longer is no caption, but a page or a fault of the list


@dataclass
class Entry:
    """A record, understood; `caption` and `language` are of a picture with a caption; `rejected` is
    an answer to which the last one is preferred; `passages` are a query and its documents, which no
    conversation is; `unread` says what of it was not used, a phrase each."""

    messages: list[Message] = field(default_factory=list)
    images: list[Picture] = field(default_factory=list)
    videos: list[Source] = field(default_factory=list)
    caption: str | None = None
    language: str | None = None
    rejected: str | None = None
    passages: Passages | None = None
    format: str = "pairs"
    unread: list[str] = field(default_factory=list)


def read_entry(record: Mapping[str, Any], caption_request: str = CAPTION_REQUEST) -> Entry:
    """What a record says.

    Args:
        caption_request: the question that a bare caption answers.

    Raises:
        BadSample: for an unknown format, a role that is none, a text that is none, a conversation
            without an answer or with an empty one, pictures and marks that differ in number, a URL,
            a box outside its picture; for a preferred answer without another, or equal to it, and
            where these answer other questions or pictures.
    """
    if is_preference(record):
        return _read_preference(record)
    fields = Fields(record)
    if is_query(record):
        passages = read_passages(fields)
        images = [image for one in passages.each() for image in one.images]
        entry = Entry(images=images, passages=passages, format="query and positive")
    elif (found := format_of(fields)) is None:
        entry = _read_pair(fields, caption_request)
    else:
        unread: list[str] = []
        entry = _read_conversation(fields, found.read(fields, unread))
        entry.format, entry.unread = found.name, unread + entry.unread
    entry.unread += [f"key {name!r}" for name in fields.unread()]
    return entry


def _read_preference(record: Mapping[str, Any]) -> Entry:
    """The conversation that ends with the chosen answer, of which nothing before is learnt, and the
    rejected one."""
    entry, other = (read_entry(one) for one in with_each_answer(record))
    if (entry.images, entry.videos) != (other.images, other.videos):
        raise BadSample("the chosen and the rejected answer have different pictures; both must be about the same", "two prompts")
    if entry.messages[:-1] != other.messages[:-1]:
        raise BadSample("the chosen and the rejected answer do not follow the same messages", "two prompts")
    chosen, rejected = entry.messages[-1], other.messages[-1]["content"]
    if chosen["content"].strip() == rejected.strip():
        raise BadSample("the chosen answer equals the rejected one, so that nothing is preferred", "equal answers")
    before: list[Message] = [{**one, "learnt": False} if one["role"] == "assistant" else one for one in entry.messages[:-1]]
    entry.messages, entry.rejected, entry.format = [*before, chosen], rejected, "chosen and rejected"
    return entry


def _read_pair(fields: Fields, request: str) -> Entry:
    record = fields.given
    image, caption = (next((name for name in names if name in record), None) for names in (IMAGES, CAPTIONS))
    if image is None or caption is None:
        missing = [name for name, x in (("image", image), ("caption", caption)) if x is None]
        formats = ", ".join(one.name for one in FORMATS)
        raise BadSample(
            f"neither a conversation ({formats}) nor a record with image and caption: {' and '.join(missing)} missing among "
            f"{[str(name)[:40] for name in sorted(map(str, record))[:20]]}",
            "unknown format",
        )
    given = fields.take(*CAPTIONS)
    text = "" if is_empty(given) else text_of(given, f"the {caption}").strip()
    check_length(text)
    images = pictures_of(fields)
    if not images or not text:
        raise BadSample(f"the {caption if images else image} is empty", "empty caption" if images else "missing image")
    if len(images) > 1:
        raise BadSample(f"a caption has one picture, not {len(images)}", "placeholders")
    if IMAGE in text:
        raise BadSample(f"the caption contains {IMAGE!r}", "placeholders")
    check_boxes(text)
    messages: list[Message] = [message_of("user", [IMAGE, request]), {"role": "assistant", "content": text}]
    return Entry(messages, images, [], text, record.get("language") or None, unread=list(suspects(text, answer=True)))


def _read_conversation(fields: Fields, turns: list[Turn]) -> Entry:
    given: dict[str, Sequence[Source]] = {IMAGE: pictures_of(fields), VIDEO: videos_of(fields)}
    unread: list[str] = []
    # A picture belongs to its question, whichever turns are left out
    settled = {mark for mark in given if _settle(turns, mark, given[mark])}
    kept = _trim_to_answers(turns)
    _check_messages([turn.message for turn in kept])
    if len(kept) < len(turns):
        unread.append("a question without an answer, or an answer without a question")
    for mark in given.keys() - settled:
        _fill(kept, mark, given[mark])
    messages = [turn.message for turn in kept]
    shown = [one for turn in kept for one in turn.shown if one.source is not None]
    images = [one.source for one in shown if one.mark == IMAGE and isinstance(one.source, str | bytes)]
    videos = [one.source for one in shown if one.mark == VIDEO and one.source is not None]
    return Entry(messages, images, videos, unread=unread)


def _settle(turns: list[Turn], mark: str, listed: Sequence[Source]) -> bool:
    """Give the marks of all turns what the record lists, if it lists as much as they need; whether
    it does."""
    places = [(turn, place) for turn in turns for place, one in enumerate(turn.shown) if one.mark == mark and one.source is None]
    numbers = [turn.shown[place].number for turn, place in places]
    if not places or (len(places) != len(listed) and not any(number is not None for number in numbers)):
        return False
    chosen = _by_number(numbers, listed, mark)
    for (turn, place), source in zip(places, chosen, strict=True):
        turn.shown[place] = Shown(mark, source)
    return True


def _by_number(numbers: Sequence[int | None], listed: Sequence[Source], mark: str) -> list[Source]:
    """What the record lists in the order of its marks, or by their numbers, from 0 or 1 on."""
    known = [number for number in numbers if number is not None]
    if not known:
        return list(listed)
    first = 0 if 0 in known else 1
    if len(known) < len(numbers) or {number - first for number in known} != set(range(len(listed))):
        what = "pictures" if mark == IMAGE else "videos"
        raise BadSample(f"{len(listed)} {what} but marks with the numbers {first_of(numbers, 8)}", "placeholders")
    return [listed[number - first] for number in known]


def _fill(turns: list[Turn], mark: str, listed: Sequence[Source]) -> None:
    """Put what has no marks before the first question. Raises BadSample where marks and what the
    record lists differ in number."""
    shown = [one for turn in turns for one in turn.shown if one.mark == mark]
    if listed and not shown:
        place = next(place for place, turn in enumerate(turns) if turn.message["role"] == "user")
        asked = turns[place].message
        parts = asked.get("parts") or [asked["content"]]
        message = message_of("user", [mark] * len(listed) + parts)
        turns[place] = Turn(message, [Shown(mark, source) for source in listed] + turns[place].shown)
        return
    given = sum(one.source is not None for one in shown)
    if mark == VIDEO and not listed and not given:
        return  # a word in angle brackets; where videos have a token, it is refused later
    if len(listed) + given != len(shown) or listed:
        what = "pictures" if mark == IMAGE else "videos"
        raise BadSample(f"{len(listed) + given} {what} but {len(shown)} {mark!r} marks", "placeholders")


def _check_messages(messages: Sequence[Message]) -> None:
    """Raise BadSample for an answer that is empty or holds a mark, for boxes that are none, and
    where nothing is learnt."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadSample(f"answer {place} is empty", "empty answer")
        if message["role"] == "assistant" and IMAGE in message["content"]:
            raise BadSample(f"answer {place} contains {IMAGE!r}", "placeholders")
        check_boxes(message["content"])
    if not any(message.get("learnt", True) for message in messages if message["role"] == "assistant"):
        raise BadSample("the weight of every answer is 0: nothing of it is learnt", "no answer")


def _trim_to_answers(turns: list[Turn]) -> list[Turn]:
    """From the first question (after a system message) to the last answer."""
    roles = [turn.message["role"] for turn in turns]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        raise BadSample("the conversation has no question with an answer", "no answer")
    system = turns[:1] if roles[0] == "system" else []
    last = len(roles) - 1 - roles[::-1].index("assistant")
    first = next(place for place in range(len(system), len(roles)) if roles[place] != "assistant")
    return [*system, *turns[first : last + 1]]


def check_length(text: str | bytes) -> None:
    """Raises BadSample for more than MAX_CAPTION characters; bytes may be 4 times as many."""
    if len(text) > MAX_CAPTION * (4 if isinstance(text, bytes) else 1):
        what = "bytes" if isinstance(text, bytes) else "characters"
        most = f"at most {MAX_CAPTION} characters are read"
        raise BadSample(f"the caption has {len(text)} {what}; {most}", "long caption")
