"""Checks files of records without training: every record goes through the reader and the collator
that training uses, with pictures of their size and without pixels.

What it finds wrong is what training would skip; see `data.files.conversations` for the formats,
`data.bad_samples` for what skipping means. Pixels that are damaged in the middle of a file are not
found.
"""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_internvl.data.bad_samples import BadSample, Unwanted, kind_of
from lightning_internvl.data.collate.base import Sample
from lightning_internvl.data.collate.pairs_of_answers import longest_row
from lightning_internvl.data.files.conversations import Entry, read_entry
from lightning_internvl.data.files.datasets import id_suffix, load_video, with_image_root
from lightning_internvl.data.files.images import image_size
from lightning_internvl.data.files.picture_sources import Source
from lightning_internvl.data.files.record_sources import open_records
from lightning_internvl.data.files.unread import UnreadAccount
from lightning_internvl.data.processors.blank import BlankPictures, blank
from lightning_internvl.data.templates import ChatTemplate

REMEMBERED = 2**20  # pictures whose headers are not read again
KEY = "of the record"  # where a message names its sample, which stands before it
LONG = 1000  # records whose tokens are counted for the statistics


class Checkable(Protocol):
    """A collator that a check can use."""

    processor: Any

    def prepare(self, sample: Sample) -> dict[str, Any]:
        """As in training."""

    def check(self, sample: Sample) -> int | None:
        """As `ChatCollator.check`."""


@dataclass(frozen=True)
class CheckedSource:
    """A file, folder or list of them, how it is read, and by which stages; None: by all."""

    path: Any
    image_root: str | None = None
    caption_request: str = ""
    pairs: bool = False
    chats: bool = True
    stages: tuple[str, ...] | None = None


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
    unread: UnreadAccount = field(default_factory=UnreadAccount)
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
        chats: by stage, what prepares conversations for training.
        pairs: likewise for pictures with captions.
        template: without `chats`, the chat format whose rules for the order of turns hold.
    """

    def __init__(
        self,
        *,
        chats: Mapping[str, Checkable] | None = None,
        pairs: Mapping[str, Checkable] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        self.chats, self.pairs = (
            {name: _without_pixels(one) for name, one in (collators or {}).items()} for collators in (chats, pairs)
        )
        self.template = template
        self.statistics = Statistics()
        self._size = functools.lru_cache(maxsize=REMEMBERED)(_picture_size)
        self._video = functools.lru_cache(maxsize=REMEMBERED)(_video_shape)

    def faults(self, sources: Sequence[CheckedSource]) -> Iterator[Fault]:
        """Everything that is wrong, in order; raises ValueError for a source that is not there."""
        for source in sources:
            for records in open_records(source.path):
                root = str(records.root if source.image_root is None else source.image_root)
                for line, record, error in records.scan():
                    self.statistics.records += 1
                    own: str | None = None
                    faults: Iterator[ValueError] = iter([error] if error is not None else [])
                    if record is not None:
                        own = None if record.get("id") in (None, "") else str(record["id"])[:80]
                        faults = self._record(record, root, source, records.unread)
                    for fault in faults:
                        kind, counts = kind_of(fault), getattr(fault, "counts", True)
                        yield Fault(str(records.path), line, own, kind, str(fault), counts)

    def _record(self, record: Mapping[str, Any], root: str, source: CheckedSource, unread: Sequence[str]) -> Iterator[ValueError]:
        """What is wrong with one record; the first fault that training would meet, and notes."""
        try:
            entry = read_entry(record, source.caption_request)
        except BadSample as error:
            yield error
            return
        self._count(entry, source)
        self.statistics.unread.add([*entry.unread, *unread])
        if entry.unread:
            yield Unwanted(f"not read: {', '.join(sorted(set(entry.unread)))}", "note: not read")
        try:
            yield from self._prepared(entry, root, source)
        except ValueError as error:
            yield error

    def _count(self, entry: Entry, source: CheckedSource) -> None:
        found = self.statistics
        found.formats[entry.format] += 1
        found.images[len(entry.images)] += 1
        found.videos += len(entry.videos)
        if source.chats:
            found.turns[sum(message["role"] == "user" for message in entry.messages)] += 1
            found.roles.update(message["role"] for message in entry.messages)
            found.characters.append(sum(len(message["content"]) for message in entry.messages))

    def _prepared(self, entry: Entry, root: str, source: CheckedSource) -> Iterator[ValueError]:
        """Notes on what training makes of a record; raises what it would raise."""
        images = [self._picture(image, root) for image in entry.images]
        if entry.passages is not None:
            shown = iter(images)
            query, positive, *wrong = (
                {"text": one.text, "images": [next(shown) for _ in one.images]} for one in entry.passages.each()
            )
            for pairs in _read_by(source, self.pairs):
                pairs.check({"query": query, "positive": positive, "negatives": wrong, "key": KEY})
            if not source.pairs:
                yield Unwanted("it has a query and documents, and the stages read conversations", "left out: no conversation")
            return
        if source.pairs and entry.caption is not None:
            language = {"language": entry.language} if entry.language else {}
            for pairs in _read_by(source, self.pairs):
                pairs.check({"image": images[0], "caption": entry.caption, "key": KEY, **language})
        if source.pairs and not source.chats and entry.caption is None:
            yield Unwanted("it is a conversation, and the stages read image-caption pairs", "left out: no pair")
        if not source.chats:
            return
        sample: dict[str, Any] = {"images": images, "conversation": entry.messages, "key": KEY}
        if entry.rejected is not None:
            sample["rejected"] = entry.rejected
        if entry.videos:
            sample["videos"] = [self._film(video, root) for video in entry.videos]
            if any(len(frames) == 1 for frames, _ in sample["videos"]):
                yield Unwanted("its video has one frame and is seen as a still picture", "note: video of one frame")
        if not self.chats and self.template is not None:
            self.template.rounds(entry.messages)
        for chats in _read_by(source, self.chats):
            if len(self.statistics.tokens) < LONG:
                self.statistics.tokens.append(longest_row(chats.prepare(sample)))
            tokens = chats.check(sample)
            if tokens is not None:
                yield Unwanted(f"it has {tokens} tokens: its last turns are left out", "note: cut")

    def _picture(self, image: str | bytes, root: str) -> np.ndarray:
        size = _picture_size(image) if isinstance(image, bytes) else self._size(os.path.join(root, image))
        if isinstance(size, BadSample):
            raise with_image_root(size, image)
        if len(self.statistics.sizes) < LONG:
            self.statistics.sizes.append(size)
        return blank((size[1], size[0], 3))

    def _film(self, video: Source, root: str) -> tuple[np.ndarray, float]:
        found = self._video(video, root)
        if isinstance(found, BadSample):
            raise found
        return blank(found[0]), found[1]


def _read_by(source: CheckedSource, collators: Mapping[str, Checkable]) -> Iterator[Checkable]:
    """The collators of the stages that read a source."""
    return (one for name, one in collators.items() if source.stages is None or name in source.stages)


def _without_pixels(collate: Checkable) -> Checkable:
    found = copy.copy(collate)
    found.processor = BlankPictures(collate.processor)
    return found


def describe_fault(fault: Fault) -> str:
    """A fault as a line of text."""
    return f"{fault.file}, line {fault.line}{id_suffix({'id': fault.id})}: {fault.reason}"


def _picture_size(source: str | bytes) -> tuple[int, int] | BadSample:
    try:
        return image_size(source)
    except BadSample as error:
        return error


def _video_shape(source: Source, root: str) -> tuple[tuple[int, ...], float] | BadSample:
    """Shape and frames a second of a video, which is read for it."""
    try:
        frames, rate = load_video(source, Path(root))
    except BadSample as error:
        return error
    return frames.shape, rate
