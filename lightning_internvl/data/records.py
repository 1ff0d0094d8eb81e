"""Files of records, one mapping each, read one at a time: JSONL, CSV, TSV, or JSON with one list."""

from __future__ import annotations

import csv
import json
import re
from array import array
from pathlib import Path
from typing import Any, NamedTuple

SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (".jsonl", ".json", *SEPARATORS)
BETWEEN = re.compile(r"[\s,]*")  # of the entries of a JSON list


class Index(NamedTuple):
    """First byte, number of bytes and line number of each record."""

    offsets: array
    sizes: array
    lines: array

    @classmethod
    def empty(cls) -> Index:
        """An index to be filled."""
        return cls(array("q"), array("q"), array("q"))

    def add(self, offset: int, size: int, line: int) -> None:
        """One more record."""
        for column, value in zip(self, (offset, size, line), strict=True):
            column.append(value)


class RecordFile:
    """The records of a file in their order. Only their places are held, and found at the first access.

    JSONL has one record a line; CSV and TSV too, after a header line; JSON is one list of records.
    Raises ValueError naming the file where it is missing or of another kind, and file and line for a record that is broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in KINDS:
            raise ValueError(f"{path}: unknown kind of list {self.path.suffix!r}; choose from {list(KINDS)}")
        if not self.path.is_file():
            raise ValueError(f"list {path} does not exist")
        self._found: Index | None = None
        self._columns: list[str] = []

    def __len__(self) -> int:
        return len(self._index().offsets)

    def read(self, position: int) -> tuple[dict[str, Any], int]:
        """A record and its line number. Raises IndexError beyond the last one."""
        index = self._index()
        if not 0 <= position < len(index.offsets):
            raise IndexError(f"record {position} of {len(index.offsets)}")
        with self.path.open("rb") as file:
            file.seek(index.offsets[position])
            content = file.read(index.sizes[position])
        line = index.lines[position]
        try:
            record = self._parse(content.decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{self.path}, line {line}: not a record: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{self.path}, line {line}: not a record, but a {type(record).__name__}")
        return record, line

    def _parse(self, text: str) -> Any:
        separator = SEPARATORS.get(self.path.suffix)
        if separator is None:
            return json.loads(text)
        return dict(zip(self._columns, next(csv.reader([text], delimiter=separator)), strict=True))

    def _index(self) -> Index:
        if self._found is None:
            self._found = self._index_list() if self.path.suffix == ".json" else self._index_lines()
        return self._found

    def _index_lines(self) -> Index:
        index, offset, separator = Index.empty(), 0, SEPARATORS.get(self.path.suffix)
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if separator is not None and number == 1:
                    self._columns = next(csv.reader([line.decode("utf-8-sig")], delimiter=separator), [])
                elif line.strip():
                    index.add(offset, len(line), number)
                offset += len(line)
        return index

    def _index_list(self) -> Index:
        """Decodes the list once, entry by entry, and keeps none of them."""
        text, index, decoder = self.path.read_bytes().decode("utf-8"), Index.empty(), json.JSONDecoder()
        position = text.find("[") + 1
        if text[:position].strip("\ufeff \t\r\n") != "[":
            raise ValueError(f"{self.path}: not a JSON list of records; a file of one record a line ends in .jsonl")
        offset, line, counted = 0, 1, 0
        while True:
            position = BETWEEN.match(text, position).end()
            offset, line = offset + len(text[counted:position].encode()), line + text.count("\n", counted, position)
            if text[position : position + 1] == "]":
                return index
            try:
                _, end = decoder.raw_decode(text, position)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {line}: not a record: {error}") from error
            size = len(text[position:end].encode())
            index.add(offset, size, line)
            line += text.count("\n", position, end)
            position = counted = end
            offset += size
