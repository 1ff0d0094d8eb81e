"""Tables of text, one record a row: commas, tabs or bars, and what quotation marks mean.

A field in quotation marks is one that begins with a mark and ends with the next single one, right
in front of a separator or the end of a line (RFC 4180): it may hold separators, line breaks and
doubled marks. Any other mark is text, as in `5" disk`, so that one mark that nobody closes costs no
other row. Python's csv module reads on to the next mark, or to the end of the file.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

BOM = b"\xef\xbb\xbf"
# Bytes of a row over several lines; the csv module allows a field as many characters
LONGEST = 131_072
_OPENING = re.compile(rb' *"')
_INSIDE = re.compile(rb'[^"]*(?:""[^"]*)*')  # up to the mark that closes a field, or the end
_FILE_NAME, _WORD = re.compile(rb".*\w\.\w{1,5}\s*"), re.compile(rb"\s*\S+\s*")


class _Row(NamedTuple):
    """The fields of a row, which were in quotation marks, and the first whose mark is open."""

    fields: list[bytes]
    marked: set[int]
    open_field: int | None


class _Enclosed(NamedTuple):
    """Where a quoted field ends, and where the next one begins; None behind the last."""

    end: int
    following: int | None


OPEN = "open"  # instead of `_Enclosed`: the field may end in another line


def read_rows(file: BinaryIO, separator: str, columns: int, line: int = 2) -> Iterator[tuple[int, bytes]]:
    """The rows of a table from where `file` stands, each with the number of its first line: all
    bytes, empty lines too.

    Args:
        separator: one ASCII character.
        columns: how many the table has. Lines that could each be a row of its own are read as such,
            even where a mark at the beginning of one's field and another at the end of one could
            enclose all that is between them.
        line: the number of the first line.
    """
    lines, mark = _Lines(file), separator.encode()
    while content := lines.read():
        if b'"' in content and not _plain(mark).row.fullmatch(content):
            content = _read_row(lines, content, mark, columns)
        yield line, content
        line += max(1, content.count(b"\n"))


def fields_of(content: bytes, separator: str) -> list[str]:
    """The fields of a row of `read_rows`; raises UnicodeDecodeError if it is not UTF-8."""
    mark, content = separator.encode(), content.rstrip(b"\r\n")
    if b'"' in content and _plain(mark).row.fullmatch(content):
        found = [marked.replace(b'""', b'"') or plain for marked, plain in _plain(mark).field.findall(content + mark)]
    else:
        found = _split_row(content, mark).fields
    return [field.decode("utf-8") for field in found]


def field_count_fault(fields: Sequence[str], columns: Sequence[str], separator: str) -> str | None:
    """What is wrong with a row of more or fewer fields than columns; None if it fits."""
    if len(fields) == len(columns):
        return None
    hint = ""
    if any(field.lstrip().startswith('"') for field in fields):
        hint = "; a quotation mark at the beginning of a field is not closed, or one within it is not doubled"
    elif len(fields) > len(columns):
        hint = f"; a field that holds {separator!r} must stand in quotation marks"
    return f"not a record of {len(columns)} fields ({', '.join(columns)}), but of {len(fields)}{hint}"


def read_table(path: Path, separators: Sequence[str] = ("\t", "|", ",")) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table that are not empty, one at a time: number of the first line, and stripped
    fields. The first row tells how many fields all have.

    Args:
        separators: the first of them that is in the first line, else the last one.

    Raises:
        ValueError: naming file and line, for a row that is not in UTF-8 or has more or fewer fields
            than the first one.
    """
    with path.open("rb") as file:
        header = file.readline().removeprefix(BOM)
        separator = next((mark for mark in separators if mark.encode() in header), separators[-1])
        columns = _decode_fields(header, separator, f"{path}: line 1")
        if header.strip():
            yield 1, columns
        for line, content in read_rows(file, separator, len(columns)):
            if content.strip():
                fields = _decode_fields(content, separator, f"{path}: line {line}")
                if wrong := field_count_fault(fields, columns, separator):
                    raise ValueError(f"{path}: line {line} is {wrong}")
                yield line, fields


def _decode_fields(content: bytes, separator: str, place: str) -> list[str]:
    try:
        return [field.strip() for field in fields_of(content, separator)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is no text in UTF-8: {error}") from error


class _Plain(NamedTuple):
    """Patterns for rows whose marks are all right, as nearly all are: the whole of one, and each of
    its fields (the text in marks, or the text of a field without) with the separator behind it."""

    row: re.Pattern[bytes]
    field: re.Pattern[bytes]


@cache
def _plain(separator: bytes) -> _Plain:
    other = re.escape(separator)
    field = rb'(?: *+"([^"]*+(?:""[^"]*+)*+)" *+|([^"' + other + rb"]*+))"
    return _Plain(re.compile(field + rb"(?:" + other + field + rb")*+[\r\n]*+"), re.compile(field + other))


class _Lines:
    """Lines of a file, some of which can be put back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.waiting: deque[bytes] = deque()

    def read(self) -> bytes:
        """The next line with its end; empty behind the last one."""
        return self.waiting.popleft() if self.waiting else self.file.readline()

    def put_back(self, lines: Sequence[bytes]) -> None:
        """Give back lines that were read, in their order."""
        self.waiting.extendleft(reversed(lines))


def _read_row(lines: _Lines, first: bytes, separator: bytes, columns: int) -> bytes:
    """A row from its first line on, with those that its fields in quotation marks go over. Where no
    mark closes such a field within LONGEST bytes, its own mark is text, and the row is that line.
    """
    taken, size = [first], len(first)
    is_open: bool | None = _split_row(first, separator).open_field is not None
    while is_open and size <= LONGEST and (more := lines.read()):
        taken.append(more)
        size += len(more)
        is_open = _still_open(more, separator)
    if is_open is False and not _are_separate_rows(taken, separator, columns):
        return b"".join(taken)
    lines.put_back(taken[1:])
    return first


def _split_row(content: bytes, separator: bytes) -> _Row:
    """The fields of a row, over one line or several."""
    content = content.rstrip(b"\r\n")
    if b'"' not in content:
        return _Row(content.split(separator), set(), None)
    fields: list[bytes] = []
    marked: set[int] = set()
    at: int | None = 0
    open_field = None
    while at is not None:
        opening = _OPENING.match(content, at)
        found = _enclosed(content, opening.end(), separator) if opening else None
        if opening and isinstance(found, _Enclosed):
            marked.add(len(fields))
            fields.append(content[opening.end() : found.end].replace(b'""', b'"'))
            at = found.following
            continue
        if found == OPEN and open_field is None:
            open_field = len(fields)
        end = content.find(separator, at)
        fields.append(content[at:] if end < 0 else content[at:end])
        at = None if end < 0 else end + 1
    return _Row(fields, marked, open_field)


def _enclosed(content: bytes, at: int, separator: bytes) -> _Enclosed | str | None:
    """Where a field ends whose text begins at a place, behind the mark that opens it; None where
    that mark is text."""
    end = next(_INSIDE.finditer(content, at)).end()
    if end == len(content):
        return OPEN
    behind = _end_of_field(separator).match(content, end + 1)
    if behind is None:
        return None
    return _Enclosed(end, behind.end() if behind[0].endswith(separator) else None)


@cache
def _end_of_field(separator: bytes) -> re.Pattern[bytes]:
    """What may follow the mark that closes a field: blanks, then the next field or the end."""
    return re.compile(rb" *(?:" + re.escape(separator) + rb"|\Z)")


def _still_open(line: bytes, separator: bytes) -> bool | None:
    """Whether a line that begins within quotation marks also ends within some; None where the marks
    enclose no field."""
    line = line.rstrip(b"\r\n")
    found = _enclosed(line, 0, separator)
    if not isinstance(found, _Enclosed):
        return True if found == OPEN else None
    return found.following is not None and _split_row(line[found.following :], separator).open_field is not None


def _are_separate_rows(lines: Sequence[bytes], separator: bytes, columns: int) -> bool:
    """Whether each of some lines could be a row of its own: all have a field for each column, and
    there is a column, beside that of the first quotation mark, in which all are alike. Lines of a
    text hardly ever are."""
    alone = [_split_row(line, separator) for line in lines if line.strip()]
    if len(alone) < 2 or any(len(row.fields) != columns for row in alone):
        return False
    others = [column for column in range(columns) if column != alone[0].open_field]
    return any(_are_of_one_kind(alone, column) for column in others)


def _are_of_one_kind(alone: Sequence[_Row], column: int) -> bool:
    """Whether all fields of a column, in quotation marks or without, are names of files, or all are
    other single words."""
    fields = [row.fields[column] for row in alone]
    files = {_FILE_NAME.fullmatch(field) is not None for field in fields}
    marked = {column in row.marked for row in alone}
    return len(files) == len(marked) == 1 and (True in files or all(map(_WORD.fullmatch, fields)))
