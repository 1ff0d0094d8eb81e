"""The published formats of records, one small reader each: how it is recognised, and its turns.

A reader takes what it uses from the record's `Fields`; what no reader takes is reported as unread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.frame_times import TIMES, timed_frames
from lightning_internvl.data.files.picture_marks import Shown, read_marks, suspects
from lightning_internvl.data.files.picture_sources import (
    IMAGES,
    VIDEOS,
    from_json,
    pictures_of,
    read_pictures,
    read_videos,
    videos_of,
)
from lightning_internvl.data.files.record_fields import Fields, is_empty
from lightning_internvl.data.templates import IMAGE, VIDEO, Message, message_of

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant",
}  # fmt: skip
SYSTEMS = ("system", "system_prompt", "system_message")
WEIGHTS = ("weight", "loss", "loss_weight", "train", "learnt")  # 0 or false: an answer is read and not learnt
PARTS = ("image", "image_url", "input_image", "video", "video_url")
PLAIN = ({"from", "value"}, {"role", "content"})  # messages of a role and a text, most of all there are
CUT = 120  # characters of a user's text in messages
BOM = "\ufeff"


class Turn(NamedTuple):
    """A message, and what each of its marks stands for."""

    message: Message
    shown: list[Shown]


class RecordFormat(NamedTuple):
    """A format: its name, whether a record has it, and the reader of its turns."""

    name: str
    recognised: Callable[[Fields], bool]
    read: Callable[[Fields, list[str]], list[Turn]]


def format_of(record: Fields) -> RecordFormat | None:
    """The first of `FORMATS` that a record has."""
    return next((one for one in FORMATS if one.recognised(record)), None)


def _conversation(*names: str) -> Callable[[Fields, list[str]], list[Turn]]:
    def read(record: Fields, unread: list[str]) -> list[Turn]:
        turns = record.take(*names)
        turns = turns if turns is not None else next(record.given[name] for name in names if name in record.given)
        return _system(record, unread) + read_messages(turns, unread)

    return read


def read_messages(turns: Any, unread: list[str]) -> list[Turn]:
    """The turns of a list of messages, which may be JSON as a text. Raises BadSample."""
    if isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{"):
        turns = from_json(turns, "a list of messages")
    if not isinstance(turns, list):
        raise BadSample(f"not a list of messages: {_cut(turns)}", "unknown format")
    return [_message(turn, unread) for turn in turns]


def _texts(record: Fields, unread: list[str]) -> list[Turn]:
    """Pairs {"user", "assistant"}, as in The Cauldron and FineVision."""
    pairs = record.take("texts")
    pairs = from_json(pairs, "a list of pairs") if isinstance(pairs, str) else pairs
    found = _system(record, unread)
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, Mapping):
            raise BadSample(f"not a pair of 'user' and 'assistant': {_cut(pair)}", "unknown format")
        fields = Fields(pair)
        found += [_said("user", fields.take("user"), unread), _said("assistant", fields.take("assistant"), unread)]
        unread += [f"key {name!r} of a pair" for name in fields.unread()]
    return found


def _question(asked: Sequence[str], more: Sequence[str], answered: Sequence[str]) -> Callable[[Fields, list[str]], list[Turn]]:
    """One question, with the exchanges before it ("history": lists of question and answer), and its
    answer; `more` names what follows the question on a line of its own."""

    def read(record: Fields, unread: list[str]) -> list[Turn]:
        found = _system(record, unread)
        for pair in _history(record.take("history")):
            found += [_said(role, text, unread) for role, text in zip(("user", "assistant"), pair, strict=True)]
        texts = [text_of(record.take(name), name) for name in (*asked, *more) if record.has(name)]
        found.append(_said("user", "\n".join(texts), unread))
        found.append(_said("assistant", _only(record.take(*answered)), unread))
        return found

    return read


def _completion(record: Fields, unread: list[str]) -> list[Turn]:
    """TRL's prompt and completion, as texts or as messages."""
    found = _system(record, unread)
    for role, name in (("user", "prompt"), ("assistant", "completion")):
        given = record.take(name)
        found += read_messages(given, unread) if isinstance(given, list) else [_said(role, given, unread)]
    return found


def _history(given: Any) -> Iterator[list[Any]]:
    given = from_json(given, "a list of questions and answers") if isinstance(given, str) else given
    for pair in given or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadSample(f"an entry of 'history' is no list of a question and an answer: {_cut(pair)}", "unknown format")
        yield pair


def _only(answer: Any) -> Any:
    """The one answer of a list."""
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def _system(record: Fields, unread: list[str]) -> list[Turn]:
    """A system message that stands beside the conversation."""
    return [_said("system", record.take(*SYSTEMS), unread)] if record.has(*SYSTEMS) else []


def _message(given: Any, unread: list[str]) -> Turn:
    if not isinstance(given, Mapping):
        raise BadSample(f"not a message: {_cut(given)}", "unknown format")
    if given.keys() in PLAIN:
        named, content = given.values() if next(iter(given)) in ("from", "role") else reversed([*given.values()])
        if isinstance(named, str) and named in ROLES and isinstance(content, str):
            return _said(ROLES[named], content, unread)
    turn = Fields(given)
    names = ("from", "value") if "from" in given else ("role", "content")
    if names[0] not in given or not (names[1] in given or "value" in given or "content" in given):
        wanted = "'from' and 'value', or 'role' and 'content'"
        raise BadSample(f"not a message with {wanted}: {_cut(given)}", "unknown format")
    named = given[names[0]]
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise BadSample(f"role {_cut(named)} is unknown; it must be one of {', '.join(ROLES)}", "unknown role")
    turn.asked |= {names[0], "value", "content"}
    content = given.get(names[1], given.get("content", given.get("value")))
    found = _said(role, content, unread, turn)
    if turn.has(*WEIGHTS) and not _is_learnt(turn.take(*WEIGHTS), role, unread):
        found.message["learnt"] = False
    unread += [f"key {name!r} of a message" for name in turn.unread()]
    return found


def _is_learnt(weight: Any, role: str, unread: list[str]) -> bool:
    """Whether the weight of a message is not 0. Other weights than 0 and 1, and a question that is
    to be learnt, are not read."""
    if weight in (0, False):
        return role != "assistant"
    if weight not in (1, True) or role != "assistant":
        unread.append(f"loss weight {weight!r:.20} of {'an answer' if role == 'assistant' else f'a {role} message'}")
    return True


def _said(role: str, content: Any, unread: list[str], turn: Fields | None = None) -> Turn:
    """A message of a text or a list of parts, and the pictures that stand beside its text."""
    if isinstance(content, str) and turn is None:
        text, shown = _text(content, role, unread)
        return Turn({"role": role, "content": text}, shown)
    parts: list[str] = []
    shown = []
    for text, marks in (
        [_part(one, role, unread) for one in content] if isinstance(content, list) else [_text(content, role, unread)]
    ):
        parts.append(text)
        shown += marks
    if turn is not None:
        parts, shown = _with_own(parts, shown, turn)
    return Turn(message_of(role, parts) if len(parts) > 1 or shown else {"role": role, "content": "".join(parts)}, shown)


def _with_own(parts: list[str], shown: list[Shown], turn: Fields) -> tuple[list[str], list[Shown]]:
    """Pictures and videos beside a message's text: they take the marks of the text, or come
    first."""
    for mark, own in ((IMAGE, pictures_of(turn)), (VIDEO, videos_of(turn))):
        open_marks = [place for place, one in enumerate(shown) if one.mark == mark and one.source is None]
        if not own:
            continue
        if not open_marks:
            parts, shown = [mark] * len(own) + parts, [Shown(mark, one) for one in own] + shown
        elif len(open_marks) == len(own):
            filled = dict(zip(open_marks, own, strict=True))
            shown = [Shown(mark, filled[place]) if place in filled else one for place, one in enumerate(shown)]
        else:
            raise BadSample(
                f"a message has {len(own)} pictures or videos of its own but {len(open_marks)} {mark!r} marks", "placeholders"
            )
    return parts, shown


def _text(given: Any, role: str, unread: list[str]) -> tuple[str, list[Shown]]:
    text, shown = text_of(given, f"the text of a {role} message"), []
    if role == "assistant":
        shown = [Shown(mark) for mark in (IMAGE, VIDEO) for _ in range(text.count(mark))] if "<" in text else []
    else:
        text, shown = read_marks(text)
    unread.extend(suspects(text, role == "assistant"))
    return text, shown


def text_of(given: Any, what: str) -> str:
    """A field that must be a text, of whole characters, without a byte order mark. Raises
    BadSample."""
    if not isinstance(given, str):
        kind = "nothing (null)" if is_empty(given) else f"{type(given).__name__} {_cut(given)}"
        raise BadSample(f"{what} is no text, nor a list of parts, but {kind}", "unknown format")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        half = f"{given[error.start]!r} at character {error.start}"
        raise BadSample(f"{what} holds half a character, {half}, which is no text in UTF-8", "broken text") from error
    return given.removeprefix(BOM)


def _part(given: Any, role: str, unread: list[str]) -> tuple[str, list[Shown]]:
    """A part of a message as text, and what it shows."""
    if not isinstance(given, Mapping):
        raise BadSample(f"not a part of the type text, image or video: {_cut(given)}", "unknown format")
    part = Fields(given)
    kind = part.take("type") or next((name for name in ("text", *PARTS) if part.has(name)), None)
    if kind in ("text", "input_text") and isinstance(given.get("text"), str):
        part.asked.add("text")
        found = _text(given["text"], role, unread)
    elif kind in PARTS:
        found = _shown_part(part, str(kind))
    else:
        raise BadSample(f"not a part of the type text, image or video: {_cut(given)}", "unknown format")
    unread += [f"key {name!r} of a part" for name in part.unread()]
    return found


def _shown_part(part: Fields, kind: str) -> tuple[str, list[Shown]]:
    is_video = "video" in kind
    mark, names, read = (VIDEO, VIDEOS, read_videos) if is_video else (IMAGE, IMAGES, read_pictures)
    given = part.take(kind, *names, "path", "url", "bytes", "base64", "data")
    part.asked |= {"path", "url"} if given is not None else set()
    sources: list[Any] = [*read(given)] if given is not None else []
    if is_video and sources and part.has(TIMES):
        sources = timed_frames(sources, part.take(TIMES))
    if len(sources) > 1:
        raise BadSample(
            f"a part shows {len(sources)} {'videos' if is_video else 'pictures'}; give each a part of its own", "placeholders"
        )
    return mark, [Shown(mark, sources[0] if sources else None)]


def _cut(given: Any) -> str:
    """A value of a record in a message, cut."""
    text = repr(given) if not isinstance(given, str) or len(given) < CUT else repr(given[:CUT])
    return text if len(text) <= CUT else text[:CUT] + "..."


def _any_key(*names: str) -> Callable[[Fields], bool]:
    return lambda record: any(name in record.given for name in names)


def _all_say(*groups: Sequence[str]) -> Callable[[Fields], bool]:
    return lambda record: all(any(name in record.given for name in names) for names in groups)


ANSWERS = ("answer", "answers", "response")
OUTPUTS = ("output", "response")
# In this order; a caption comes last (see `conversations.read_entry`)
FORMATS = (
    RecordFormat("conversations", _any_key("conversations", "conversation"), _conversation("conversations", "conversation")),
    RecordFormat("messages", _any_key("messages"), _conversation("messages")),
    RecordFormat("texts", lambda record: isinstance(record.given.get("texts"), list | str), _texts),
    RecordFormat("query and response", _all_say(("query",), ANSWERS), _question(("query",), (), ANSWERS)),
    RecordFormat("instruction and output", _all_say(("instruction",), OUTPUTS), _question(("instruction",), ("input",), OUTPUTS)),
    RecordFormat("prompt and completion", _all_say(("prompt",), ("completion",)), _completion),
    RecordFormat("question and answer", _all_say(("question",), ANSWERS), _question(("question",), (), ANSWERS)),
)
