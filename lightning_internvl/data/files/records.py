"""Files of records, mappings read one at a time: JSONL, CSV, TSV, or a JSON list."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.record_fields import each_once
from lightning_internvl.data.files.table_rows import BOM, field_count_fault, fields_of, read_rows
from lightning_internvl.files import content_of

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson", *SEPARATORS)
KINDS = (*LINES, ".json")
PARQUET = (".parquet", ".pq")  # see `ParquetRecords`
BETWEEN = re.compile(r"[\s,]*")  # of the entries of a JSON list
CONVERT = "records are read in UTF-8: convert it, as with iconv -f UTF-16 -t UTF-8 (or -f LATIN1)"
LOOKED_AT = 65_536  # bytes of a file's beginning
DIGESTS = 2**32  # how many there are


class ScannedRecord(NamedTuple):
    """A row as `Records.scan` meets it: the record, or what is wrong with it."""

    line: int
    record: dict[str, Any] | None
    error: BadSample | None = None


class Records(ABC):
    """The records of one source in order; only places are held, found at first access.

    Attributes:
        path: file or folder.
        root: where the paths of pictures start.
        times: how often an epoch reads each record; of a part of one, evenly spread ones.
        unread: what is said of all its records and not read.
    """

    path: Path
    root: Path
    times: float = 1.0
    unread: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, position: int) -> tuple[dict[str, Any], int]:
        """A record and its line number. Raises IndexError, or BadSample for a broken record."""

    @abstractmethod
    def scan(self) -> Iterator[ScannedRecord]:
        """All records from the first to the last, broken ones too, in one reading."""

    @abstractmethod
    def digest(self, position: int) -> int:
        """A number below 2**32 that depends on the record alone."""

    def identity(self) -> str:
        """What changes when the records do."""
        return content_of(self.path)

    def name(self, line: int) -> str:
        """How a record is called in messages."""
        return f"{self.path}, line {line}"

    def key(self, line: int) -> str:
        """The short name of a record."""
        return f"{self.path.name}:{line}"


class RecordFile(Records):
    """JSONL has one record a line; CSV and TSV a row, after a header line (see `table_rows`); JSON
    is one list of records.

    Raises ValueError naming the file where it is missing or of another kind, and file and line for
    a record that is broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.root = self.path.parent
        self.kind = self.path.suffix.lower()
        if self.kind not in KINDS:
            known = [*KINDS, *PARQUET]
            fault = f"unknown kind of list {self.path.suffix!r}"
            raise ValueError(f"{path}: {fault}; choose from {known}, or give a folder")
        if not self.path.is_file():
            raise ValueError(f"list {path} does not exist")
        check_text_file(self.path, one_a_line=self.kind in LINES[:2])
        self.separator = SEPARATORS.get(self.kind)
        self._found: _Index | None = None
        self._columns: list[str] = []

    def __len__(self) -> int:
        return len(self._index().offsets)

    def digest(self, position: int) -> int:
        return self._index().digests[position]

    def read(self, position: int) -> tuple[dict[str, Any], int]:
        index = self._index()
        if not 0 <= position < len(index.offsets):
            raise IndexError(f"record {position} of {len(index.offsets)}")
        with self.path.open("rb") as file:
            file.seek(index.offsets[position])
            content = file.read(index.sizes[position])
        line = index.lines[position]
        try:
            return self._parse(content), line
        except BadSample as error:
            raise BadSample(f"{self.name(line)}: {error}", error.kind, self.key(line)) from error

    def scan(self) -> Iterator[ScannedRecord]:
        if self.kind == ".json":
            yield from self._scan_list()
            return
        for line, content in self._lines():
            try:
                yield ScannedRecord(line, self._parse(content))
            except BadSample as error:
                yield ScannedRecord(line, None, error)

    def _parse(self, content: bytes) -> dict[str, Any]:
        try:
            mark = self.separator
            record = json.loads(content, object_pairs_hook=each_once) if mark is None else self._row(content, mark)
        except BadSample:
            raise
        except UnicodeDecodeError as error:
            raise BadSample(f"not in UTF-8: {error.reason} at its byte {error.start}; {CONVERT}", "broken line") from error
        except (ValueError, RecursionError) as error:
            raise BadSample(f"not a record: {error}", "broken line") from error
        if not isinstance(record, dict):
            raise BadSample(f"not a record, but a {type(record).__name__}", "broken line")
        return record

    def _row(self, content: bytes, separator: str) -> dict[str, str]:
        fields = fields_of(content, separator)
        if wrong := field_count_fault(fields, self._columns, separator):
            raise BadSample(wrong, "broken line")
        return dict(zip(self._columns, fields, strict=True))

    def _index(self) -> _Index:
        if self._found is None:
            self._found = self._index_list() if self.kind == ".json" else self._index_lines()
        return self._found

    def _index_lines(self) -> _Index:
        index, offset = _Index.empty(), 0
        for line, content in self._lines(blank=True):
            if line and content.strip():
                index.add(offset, content, line)
            offset += len(content)
        return index

    def _lines(self, blank: bool = False) -> Iterator[tuple[int, bytes]]:
        """The records as they stand, with their line numbers. With `blank` every byte of the file:
        empty lines too, and under the number 0 the header of a table and a byte order mark. Fields
        of a table may go over several lines (see `table_rows`)."""
        with self.path.open("rb") as file:
            if file.read(len(BOM)) != BOM:
                file.seek(0)
            elif blank:
                yield 0, BOM
            found: Iterator[tuple[int, bytes]] = enumerate(file, start=1)
            if self.separator is not None:
                header = file.readline()
                self._columns = self._named_columns(header, self.separator)
                if blank:
                    yield 0, header
                found = read_rows(file, self.separator, len(self._columns))
            for line, content in found:
                if blank or content.strip():
                    yield line, content

    def _named_columns(self, header: bytes, separator: str) -> list[str]:
        try:
            return fields_of(header, separator)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: the first line is no text in UTF-8: {error}") from error

    def _index_list(self) -> _Index:
        index = _Index.empty()
        for line, offset, content, _ in self._entries():
            index.add(offset, content, line)
        return index

    def _scan_list(self) -> Iterator[ScannedRecord]:
        try:
            for line, _, _, record in self._entries():
                if isinstance(record, dict):
                    yield ScannedRecord(line, record)
                else:
                    reason = f"not a record, but a {type(record).__name__}"
                    yield ScannedRecord(line, None, BadSample(reason, "broken line"))
        except BadSample as error:  # what follows cannot be found
            yield ScannedRecord(int(error.key or 0), None, error)

    def _text(self) -> str:
        try:
            return self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is no text in UTF-8: {error.reason} at byte {error.start}; {CONVERT}") from error

    def _entries(self) -> Iterator[tuple[int, int, bytes, Any]]:
        """Line, first byte, bytes and value of each entry of a JSON list; none is kept."""
        text, decoder = self._text(), json.JSONDecoder(object_pairs_hook=each_once)
        position = text.find("[") + 1
        if text[:position].strip("\ufeff \t\r\n") != "[":
            advice = "a file of one record a line ends in .jsonl"
            raise ValueError(f"{self.path}: not a JSON list of records; {advice}")
        offset, line, counted = 0, 1, 0
        while True:
            between = BETWEEN.match(text, position)
            assert between is not None  # it matches nothing at all too
            position = between.end()
            offset += len(text[counted:position].encode())
            line += text.count("\n", counted, position)
            if text[position : position + 1] == "]":
                return
            try:
                value, end = decoder.raw_decode(text, position)
            except ValueError as error:
                raise BadSample(f"{self.name(line)}: not a record: {error}", "broken list", str(line)) from error
            content = text[position:end].encode()
            yield line, offset, content, value
            line += text.count("\n", position, end)
            position = counted = end
            offset += len(content)


def check_text_file(path: Path, one_a_line: bool) -> None:
    """Raise ValueError naming a file that cannot be a list of records: by its first bytes, which
    tell UTF-16 and UTF-32, and for one record a line by its first line."""
    with path.open("rb") as file:
        head = file.read(LOOKED_AT)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        raise ValueError(f"{path}: the first line is no text in UTF-8, but one in UTF-16 or UTF-32, or none; {CONVERT}")
    first = head.removeprefix(BOM).lstrip().partition(b"\n")[0].strip()
    if one_a_line and first[:1] == b"[":
        raise ValueError(f"{path} holds a JSON list, not one record a line: give it a name that ends in .json ({path.stem}.json)")
    if one_a_line and first == b"{":
        advice = "write one record a line, or a JSON list of them as a .json file"
        raise ValueError(f"{path}: its first record goes over several lines; {advice}")


class _Index(NamedTuple):
    """First byte, number of bytes, line number and digest of each record."""

    offsets: array
    sizes: array
    lines: array
    digests: array

    @classmethod
    def empty(cls) -> _Index:
        """An index to be filled."""
        return cls(array("q"), array("q"), array("q"), array("I"))

    def add(self, offset: int, content: bytes, line: int) -> None:
        """One more record."""
        values = (offset, len(content), line, digest_of(content.strip()))
        for column, value in zip(self, values, strict=True):
            column.append(value)


def digest_of(content: bytes) -> int:
    """A number below `DIGESTS` that depends on the content alone."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest())
