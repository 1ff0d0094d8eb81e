"""Map-style datasets of your own files: image-caption pairs, and conversations about pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_internvl.data.bad_samples import BadSample, Unwanted, kind_of, reason_of
from lightning_internvl.data.files.conversations import CAPTION_REQUEST, Entry, read_entry
from lightning_internvl.data.files.frame_times import TimedFrames, rate_of
from lightning_internvl.data.files.images import read_image
from lightning_internvl.data.files.passages import Passage
from lightning_internvl.data.files.picture_sources import Picture, Source
from lightning_internvl.data.files.record_sources import JoinedRecords, open_records
from lightning_internvl.data.files.unread import LOOKED_AT, UnreadAccount
from lightning_internvl.data.files.videos import read_frames, read_video
from lightning_internvl.files import state_of


class FileDataset(Dataset[dict[str, Any]], ABC):
    """Samples of files of records (see `open_records` and `read_entry`).

    Args:
        path: a file, a folder of pictures with captions, or a list of them; None is answered with
            the setting to give.
        image_root: where the paths of pictures start; None: the folder of each file.
        length: only that many records, from the first on.
        validation: a share of the records that is held out (which ones depends on each record
            alone), or a file of others.
        caption_request: the question that a bare caption answers.
        apart: the records that are held out, in place of the others.

    A record that cannot be used raises a ValueError that names file, line and the record's `id`.
    """

    what: str
    setting: str

    def __init__(
        self,
        path: str | Path | Sequence[str | Path] | None,
        image_root: str | Path | None = None,
        length: int | None = None,
        validation: float | str | Path | None = None,
        caption_request: str = CAPTION_REQUEST,
        apart: bool = False,
    ) -> None:
        if path is None:
            raise ValueError(f"no file of {self.what} is given; give {self.setting}=FILE")
        share = 0.0 if validation is None or isinstance(validation, str | Path) else float(validation)
        if not 0.0 <= share < 1.0:
            raise ValueError(f"data.{validation=} must be a share from 0 on and below 1, or a file")
        self.settings: dict[str, Any] = {
            "path": path,
            "image_root": image_root,
            "length": length,
            "validation": validation,
            "caption_request": caption_request,
        }
        self.caption_request = caption_request
        self.records = JoinedRecords(open_records(path), length, share, apart)
        self.image_root = None if image_root is None else Path(image_root)

    def __len__(self) -> int:
        return len(self.records)

    def held_out(self) -> FileDataset | None:
        """The data that is measured and never trained on; None without any.

        Raises:
            ValueError: if a file of such data holds no record.
        """
        validation = self.settings["validation"]
        if isinstance(validation, str | Path):
            changes = {"path": validation, "length": None, "validation": None}
            found = type(self)(**{**self.settings, **changes})
            if len(found) == 0:
                raise ValueError(f"data.validation={validation} holds no record to measure on")
            return found
        return type(self)(**self.settings, apart=True) if validation else None

    def __getitem__(self, position: int) -> dict[str, Any]:
        source, record, line = self.records.read(position)
        marked = id_suffix(record)
        key = source.key(line) + marked
        try:
            entry = read_entry(record, self.caption_request)
            root = source.root if self.image_root is None else self.image_root
            return {**self.sample(entry, root), "key": key}
        except Exception as error:
            kept = Unwanted if isinstance(error, Unwanted) else BadSample
            raise kept(f"{source.name(line)}{marked}: {reason_of(error)}", kind_of(error), key) from error

    def identity(self) -> dict[str, Any]:
        """The bytes of the files of records; names, sizes and times of all pictures and videos that
        these name; the same of a file that is measured on."""
        sources = [[source.identity(), source.times, str(source.root)] for source in self.records.sources]
        found: dict[str, Any] = {"records": sources, "pictures": state_of(self._named_files())}
        if isinstance(self.settings["validation"], str | Path) and (apart := self.held_out()):
            found["held out"] = apart.identity()
        return found

    def _named_files(self) -> Iterator[Path]:
        for source in self.records.sources:
            root = source.root if self.image_root is None else self.image_root
            for _, record, _ in source.scan():
                try:
                    entry = read_entry(record or {}, self.caption_request)
                except ValueError:  # which is no sample, whatever stands in its files
                    continue
                groups = [(name,) if isinstance(name, str | bytes) else name for name in (*entry.images, *entry.videos)]
                yield from (root / name for names in groups for name in names if isinstance(name, str))

    def unread(self, count: int = LOOKED_AT) -> UnreadAccount:
        """What is not read of some records, spread evenly; those that cannot be used are left
        out."""
        account = UnreadAccount()
        for position in self.records.looked_at(count):
            try:
                source, record, _ = self.records.read(position)
                account.add([*read_entry(record, self.caption_request).unread, *source.unread])
            except BadSample:
                continue
        return account

    @abstractmethod
    def sample(self, entry: Entry, root: Path) -> dict[str, Any]:
        """What a record gives, without its key; paths start at `root`. Raises ValueError."""


def id_suffix(record: Mapping[str, Any]) -> str:
    """The record's own name as an addition to its place."""
    return "" if record.get("id") in (None, "") else f" (id {record['id']!s:.80})"


def load_image(source: Picture, root: Path) -> np.ndarray:
    """A picture of a record, (H, W, 3) uint8. Raises BadSample."""
    try:
        return read_image(source if isinstance(source, bytes) else root / source)
    except BadSample as error:
        raise with_image_root(error, source) from error.__cause__


def with_image_root(error: BadSample, source: Picture) -> BadSample:
    """The fault of a picture; of one that is not there with the setting that says where it is."""
    if kind_of(error) != "missing image" or not isinstance(source, str):
        return error
    advice = "data.image_root=FOLDER says where the paths of pictures start"
    return BadSample(f"{error} (the record says {source:.200}); {advice}", error.kind, error.key)


def load_video(source: Source, root: Path) -> tuple[np.ndarray, float]:
    """A video of a record, (F, H, W, 3) uint8, and its frames a second."""
    if isinstance(source, bytes):
        raise BadSample("videos are read by their paths, not from bytes", "video")
    try:
        if not isinstance(source, tuple):
            return read_video(root / source)
        frames, rate = read_frames([root / name for name in source])
        return frames, rate_of(source) if isinstance(source, TimedFrames) else rate
    except ValueError as error:
        raise BadSample(str(error), "video") from error


def load_passage(passage: Passage, root: Path) -> dict[str, Any]:
    """{"text", "images": [(H, W, 3) uint8]} of a passage. Raises BadSample."""
    return {"text": passage.text, "images": [load_image(name, root) for name in passage.images]}


class PairsFile(FileDataset):
    """{"image": (H, W, 3) uint8, "caption", "language", "image_id", "key"} from records of a
    picture and its caption; {"query", "positive", "negatives", "key"}, {"text", "images"} each, from
    those of a query and its documents.

    `image_id` is the path, so that all captions of one picture are known to be its own. A
    conversation among the records is left out.
    """

    what, setting = "image-caption pairs", "data.path=FILE or data.pairs_path"

    def __init__(self, path: Any, *args: Any, language: str = "en", **options: Any) -> None:
        super().__init__(path, *args, **options)
        self.settings["language"] = self.language = language

    def sample(self, entry: Entry, root: Path) -> dict[str, Any]:
        """Picture and caption of a record, or its query and documents."""
        if entry.passages is not None:
            query, positive, negatives = entry.passages
            wrong = [load_passage(one, root) for one in negatives]
            return {"query": load_passage(query, root), "positive": load_passage(positive, root), "negatives": wrong}
        if entry.caption is None:
            raise Unwanted("it is a conversation, and this stage reads image-caption pairs", "left out: no pair")
        (name,) = entry.images
        language = entry.language or self.language
        found = {"image": load_image(name, root), "caption": entry.caption, "language": language}
        return found if isinstance(name, bytes) else {**found, "image_id": name}


class ChatsFile(FileDataset):
    """{"images": [(H, W, 3) uint8], "conversation": [messages][, "videos"][, "rejected"], "key"} from
    conversations, captions and preferences; "rejected" is an answer to which the last one is
    preferred.

    A caption is the answer to `caption_request`. Videos stand under "videos" with their frames a
    second (see `read_video`). An answer before the first question and a question after the last
    answer are left out.
    """

    what, setting = "conversations", "data.path=FILE or data.chats_path"

    def sample(self, entry: Entry, root: Path) -> dict[str, Any]:
        """Pictures and conversation of a record."""
        if entry.passages is not None:
            raise Unwanted("it has a query and documents, and this stage reads conversations", "left out: no conversation")
        images = [load_image(name, root) for name in entry.images]
        found: dict[str, Any] = {"images": images, "conversation": entry.messages}
        if entry.rejected is not None:
            found["rejected"] = entry.rejected
        if entry.videos:
            return {**found, "videos": [load_video(name, root) for name in entry.videos]}
        return found
