"""Checks files of records without training: every line, of pictures only the headers.

What it finds wrong is what training would skip; see `data.files.conversations` for the
formats, `data.bad_samples` for what skipping means.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_internvl.data.bad_samples import BadSample, Unwanted, kind_of
from lightning_internvl.data.files.conversations import Entry, read_entry
from lightning_internvl.data.files.datasets import id_suffix
from lightning_internvl.data.files.images import image_size, is_image_file
from lightning_internvl.data.files.record_sources import open_records
from lightning_internvl.data.files.videos import ANIMATED
from lightning_internvl.data.templates import VIDEO, ChatTemplate

REMEMBERED = 2**20  # pictures whose headers are not read again
# Long records that are tokenised, and records whose tokens are counted for the statistics
LONG = 1000


@dataclass(frozen=True)
class CheckedSource:
    """A file, folder or list of them, and how it is read."""

    path: Any
    image_root: str | None = None
    caption_request: str = ""
    pairs: bool = False
    chats: bool = True


@dataclass(frozen=True)
class Fault:
    """What is wrong with one record; `bad` where training would skip it."""

    file: str
    line: int
    id: str | None
    kind: str
    reason: str
    bad: bool = True


@dataclass
class Statistics:
    """What the records hold."""

    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    videos: int = 0
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


class FileCheck:
    """One reading of all sources.

    Args:
        template: the chat format, whose rules for the order of turns hold; None where no stage
            reads conversations.
        tokenizer: for lengths; None counts characters only.
        max_text_tokens: of a conversation.
        too_long: "cut" or "skip", as in training.
        videos: whether the recipe has a token for videos.
    """

    def __init__(
        self,
        *,
        template: ChatTemplate | None = None,
        tokenizer: Any = None,
        max_text_tokens: int | None = None,
        too_long: str = "cut",
        videos: bool = False,
    ) -> None:
        self.template, self.tokenizer, self.videos = template, tokenizer, videos
        self.limit, self.too_long = max_text_tokens, too_long
        self.statistics = Statistics()
        self._size = functools.lru_cache(maxsize=REMEMBERED)(_picture_size)
        self._frames = functools.lru_cache(maxsize=REMEMBERED)(_frame_count)
        self._tokenised = 0

    def faults(self, sources: Sequence[CheckedSource]) -> Iterator[Fault]:
        """Everything that is wrong, in order; raises ValueError for a source that is not there."""
        for source in sources:
            for records in open_records(source.path):
                root = str(records.root if source.image_root is None else source.image_root)
                for line, record, error in records.scan():
                    self.statistics.records += 1
                    own, faults = None, iter([error] if error is not None else [])
                    if record is not None:
                        own = None if record.get("id") in (None, "") else str(record["id"])
                        faults = self._record(record, root, source)
                    for fault in faults:
                        kind, reason = kind_of(fault), str(fault)
                        yield Fault(str(records.path), line, own, kind, reason, fault.counts)

    def _record(self, record: Mapping[str, Any], root: str, source: CheckedSource) -> Iterator[BadSample]:
        """What is wrong with one record; the first fault that training would meet, and notes."""
        found = self.statistics
        try:
            entry = read_entry(record, source.caption_request)
        except BadSample as error:
            yield error
            return
        chats = "messages" if "messages" in record else "conversations"
        found.formats["pairs" if entry.caption is not None else chats] += 1
        found.images[len(entry.images)] += 1
        found.videos += len(entry.videos)
        if source.chats:
            found.turns[sum(message["role"] == "user" for message in entry.messages)] += 1
            found.roles.update(message["role"] for message in entry.messages)
        try:
            self._pictures(entry, root)
            if source.chats:
                self._turns(entry)
                yield from self._length(entry)
        except BadSample as error:
            yield error
        yield from self._notes(entry, root, source)

    def _pictures(self, entry: Entry, root: str) -> None:
        for image in entry.images:
            size = self._size(_full_path(image, root)) if isinstance(image, str) else image_size(image)
            if isinstance(size, BadSample):
                raise size
            if self.statistics.records <= LONG:
                self.statistics.sizes.append(size)
        for video in entry.videos:
            if not self.videos:
                reason = "it has videos, for which this recipe has no token; set data.video_token"
                raise BadSample(reason, "video")
            if not isinstance(video, str):
                raise BadSample("a video is read by path", "video")
            frames = self._frames(_full_path(video, root))
            if isinstance(frames, BadSample):
                raise frames

    def _turns(self, entry: Entry) -> None:
        marked = any(VIDEO in message["content"] for message in entry.messages)
        if self.videos and not entry.videos and marked:
            raise BadSample(f"0 videos but {VIDEO!r} marks", "placeholders")
        roles = [message["role"] for message in entry.messages]
        usual = roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)
        if self.template is not None and not usual:
            try:  # the order is not the usual one: it depends on the template
                self.template.rounds(entry.messages, "</s>")
            except ValueError as error:
                raise BadSample(str(error), "order of turns") from error

    def _length(self, entry: Entry) -> Iterator[BadSample]:
        """Notes and the fault of a conversation whose text is too long."""
        found, texts = self.statistics, [message["content"] for message in entry.messages]
        characters = sum(map(len, texts))
        found.characters.append(characters)
        if self.tokenizer is None:
            return
        counted = None
        if len(found.tokens) < LONG:
            counted = self._count(texts)
            found.tokens.append(counted)
        if self.limit is None or characters <= self.limit // 2:
            return
        if counted is None and self._tokenised < LONG:
            self._tokenised += 1
            counted = self._count(texts)
        if counted is None or counted <= self.limit:
            return
        first = self._count(texts[: 3 if entry.messages[0]["role"] == "system" else 2])
        over = f"its text has {counted} tokens, max_text_tokens is {self.limit}"
        if self.too_long == "skip":
            yield Unwanted(f"{over}, and data.too_long is skip: left out", "left out: too long")
        elif first > self.limit:
            raise BadSample(f"{over}, and its first turn alone has {first}", "too long")
        else:
            yield Unwanted(f"{over}: its last turns are left out", "note: cut")

    def _count(self, texts: Sequence[str]) -> int:
        return len(self.tokenizer.encode("\n".join(texts), add_special_tokens=False))

    def _notes(self, entry: Entry, root: str, source: CheckedSource) -> Iterator[BadSample]:
        if source.pairs and not source.chats and entry.caption is None:
            yield Unwanted("it is a conversation, and the stages read image-caption pairs", "left out: no pair")
        paths = [_full_path(video, root) for video in entry.videos if isinstance(video, str)]
        if self.videos and any(self._frames(path) == 1 for path in paths):
            reason = "its video has one frame and is seen as a still picture"
            yield Unwanted(reason, "note: video of one frame")


def describe_fault(fault: Fault) -> str:
    """A fault as a line of text."""
    return f"{fault.file}, line {fault.line}{id_suffix({'id': fault.id})}: {fault.reason}"


def _full_path(source: str, root: str) -> str:
    return os.path.join(root, source)


def _picture_size(path: str) -> tuple[int, int] | BadSample:
    try:
        return image_size(path)
    except BadSample as error:
        return error


def _frame_count(path: str) -> int | BadSample:
    """Frames of a video, as far as a header tells: 0 where they are not known without decoding."""
    if os.path.isdir(path):
        frames = sum(map(is_image_file, os.listdir(path)))
        return frames or BadSample(f"{path}: the folder holds no frames", "video")
    if not os.path.isfile(path):
        return BadSample(f"{path}: there is no such video", "video")
    if Path(path).suffix.lower() not in ANIMATED:
        return 0
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1)
    except (OSError, SyntaxError, ValueError) as error:
        return BadSample(f"{path}: damaged, or no picture: {error}", "video")
