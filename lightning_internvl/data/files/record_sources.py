"""What `data.path` may be: a file of records, a folder of pictures with captions, or a list of
them; and what of it is read."""

from __future__ import annotations

import bisect
import itertools
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.images import is_image_file
from lightning_internvl.data.files.meta_files import WeightedSet, read_entry_of_path, read_meta
from lightning_internvl.data.files.parquet import ParquetRecords
from lightning_internvl.data.files.records import DIGESTS, KINDS, PARQUET, RecordFile, Records, ScannedRecord, digest_of
from lightning_internvl.files import state_of


class FolderRecords(Records):
    """Pictures of a folder, at any depth, each with its caption in a text file of the same name."""

    def __init__(self, path: str | Path) -> None:
        self.path = self.root = Path(path)
        names: dict[str, dict[str, str]] = {}
        for file in sorted(self.path.rglob("*")):
            kind = "image" if is_image_file(file) else "caption" if file.suffix.lower() == ".txt" else None
            if kind and not any(part.startswith(".") for part in file.relative_to(self.path).parts):
                name = file.relative_to(self.path)
                names.setdefault(str(name.with_suffix("")), {})[kind] = str(name)
        self.names = list(names.values())
        if not any(len(one) == 2 for one in self.names):
            raise ValueError(
                f"{path}: the folder holds no picture with a text file of the same name (cat.jpg "
                f"and cat.txt); or give a list of records ({', '.join(KINDS)})"
            )

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> tuple[dict[str, Any], int]:
        """{"image": its path from the folder, "caption": text} and its number, counted from 1.

        Raises:
            IndexError: beyond the last one.
            BadSample: naming the record if it has no picture, no text file, or one that is not in
                UTF-8.
        """
        if not 0 <= position < len(self.names):
            raise IndexError(f"record {position} of {len(self.names)}")
        names = self.names[position]
        if missing := {"image", "caption"} - names.keys():
            raise BadSample(
                f"{self.name(position + 1)}: there is no {'picture' if 'image' in missing else 'text file'} of that name",
                "missing image" if "image" in missing else "empty caption",
                self.key(position + 1),
            )
        try:
            caption = (self.path / names["caption"]).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            message = f"{self.path / names['caption']}: not a text in UTF-8: {error}"
            raise BadSample(message, "broken line", self.key(position + 1)) from error
        return {"image": names["image"], "caption": caption}, position + 1

    def scan(self) -> Iterator[ScannedRecord]:
        """All records by numbers from 1 on; of a broken one its fault."""
        for position in range(len(self)):
            try:
                yield ScannedRecord(position + 1, self.read(position)[0])
            except BadSample as error:
                yield ScannedRecord(position + 1, None, error)

    def digest(self, position: int) -> int:
        return digest_of(self.key(position + 1).encode())

    def identity(self) -> str:
        return state_of(self.path / name for names in self.names for name in names.values())

    def name(self, line: int) -> str:
        return str(self.path / self.key(line))

    def key(self, line: int) -> str:
        names = self.names[line - 1]
        return names.get("image") or names["caption"]


def open_records(path: str | Path | Mapping[str, Any] | Sequence[Any]) -> list[Records]:
    """The sources of a setting: a file, a folder of pictures with captions, a meta file of several
    sets, {path, weight, image_root} (see `meta_files`), or a list of them.

    Raises:
        ValueError: for a path that is not there or of an unknown kind.
    """
    if isinstance(path, Mapping):
        return _open_weighted(read_entry_of_path(path))
    if not isinstance(path, str | Path):
        return [source for one in path for source in open_records(one)]
    if (sets := read_meta(Path(path))) is not None:
        return [source for one in sets for source in _open_weighted(one)]
    if Path(path).is_dir():
        return [FolderRecords(path)]
    if Path(path).suffix.lower() in PARQUET:
        return [ParquetRecords(path)]
    return [RecordFile(path)]


def _open_weighted(one: WeightedSet) -> list[Records]:
    found = open_records(one.path)
    for source in found:
        source.times, source.unread = source.times * one.times, (*source.unread, *one.unread)
        source.root = source.root if one.root is None else one.root
    return found


class JoinedRecords:
    """The records of several sources, one after the other.

    Args:
        length: only that many records, from the first on.
        held_out: the share of records that is set apart; which ones depends on each record alone.
            Of two different records or more at least one is set apart, and at least one is not.
        apart: the records set apart, in place of the others.
    """

    def __init__(
        self,
        sources: Sequence[Records],
        length: int | None = None,
        held_out: float = 0.0,
        apart: bool = False,
    ) -> None:
        self.sources, self.limit = list(sources), length
        self.held_out, self.apart = held_out, apart

    def __len__(self) -> int:
        return len(self._places) if self.held_out else self._total

    def read(self, position: int) -> tuple[Records, dict[str, Any], int]:
        """The source of a record, the record, and its line there, counted from 1.

        Args:
            position: from 0 on, among the records that are read.

        Raises:
            IndexError: beyond the last one.
            BadSample: naming the record if it is broken.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        source, place = self._source(self._places[position] if self.held_out else position)
        record, line = source.read(place)
        return source, record, line

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(_count(source) for source in self.sources))

    @property
    def _total(self) -> int:
        return self._ends[-1] if self.limit is None else min(self.limit, self._ends[-1])

    def _source(self, position: int) -> tuple[Records, int]:
        which = bisect.bisect_right(self._ends, position)
        source = self.sources[which]
        return source, _place(source, position - (self._ends[which - 1] if which else 0))

    @cached_property
    def _places(self) -> array[int]:
        digests = np.fromiter((self._digest(position) for position in range(self._total)), np.uint64)
        if not len(digests):
            return array("q")
        lowest, highest = int(digests.min()), int(digests.max())
        below = min(max(math.ceil(self.held_out * DIGESTS), lowest + 1), highest)
        return array("q", np.flatnonzero((digests < np.uint64(below)) == self.apart).tolist())

    def looked_at(self, count: int) -> Iterator[int]:
        """Positions of some records, spread evenly; the first ones where another place costs a
        whole group of rows."""
        total = len(self)
        step = 1 if any(isinstance(source, ParquetRecords) for source in self.sources) else max(1.0, total / count)
        return (int(number * step) for number in range(min(total, count)))

    def _digest(self, position: int) -> int:
        source, place = self._source(position)
        return source.digest(place)


def _count(source: Records) -> int:
    """Records that an epoch reads of a source: one at least, if it has any."""
    return max(min(1, len(source)), round(source.times * len(source)))


def _place(source: Records, position: int) -> int:
    """The record at a position of a source that is read `times` times: whole rounds, then records
    that are spread evenly."""
    whole, place = divmod(position, len(source))
    left = _count(source) - whole * len(source)
    return place if left >= len(source) else place * len(source) // left
