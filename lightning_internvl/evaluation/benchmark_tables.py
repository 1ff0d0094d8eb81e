"""Tables of public sets with pictures inside: parquet as on the Hugging Face hub, and TSV with
pictures in base64 as VLMEvalKit keeps them."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning_internvl.data.files.parquet import ParquetRecords
from lightning_internvl.evaluation.shown_pictures import StoredPicture

LONGEST = 2**30  # letters of a field: a picture in base64
REFERENCE = 64  # letters up to which a picture's text names the row that holds it


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        place: "FILE, row N".
        values: by column, without those that are empty.
        pictures: by column.
    """

    place: str
    values: dict[str, Any]
    pictures: dict[str, StoredPicture] = field(default_factory=dict)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .parquet or .tsv file; pictures are read when they are looked at.

    Raises:
        ValueError: naming the file, if it is neither or damaged.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".tsv":
        return _tsv_rows(path)
    raise ValueError(f"{path}: neither .parquet nor .tsv, the kinds that this set is published in")


def files_of(path: Path, pattern: str) -> list[Path]:
    """A file itself; of a folder all files below it whose names fit a pattern, in their order.

    Raises:
        ValueError: if there is none.
    """
    files = [path] if path.is_file() else sorted(path.rglob(pattern))
    if not files:
        raise ValueError(f"path={path} holds no file {pattern}, in it or in a folder below")
    return files


# --- parquet ------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Iterator[Row]:
    records = ParquetRecords(path)
    for number, found in enumerate(records.scan()):
        place = f"{path}, row {number + 1}"
        own = {column: value for column, value in (found.record or {}).items() if value is not None}
        stored = {column for column, value in own.items() if _holds_picture(value)}
        values = {column: value for column, value in own.items() if column not in stored}
        pictures = {
            column: StoredPicture(f"{place}, {column}", partial(_bytes_of_record, records, number, column)) for column in stored
        }
        yield Row(place, values, pictures)


def _holds_picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes))


def _bytes_of_record(records: ParquetRecords, number: int, column: str) -> bytes:
    value = records.read(number)[0][column]
    return value if isinstance(value, bytes) else value["bytes"]


# --- TSV ----------------------------------------------------------------------------------------


def _tsv_rows(path: Path) -> Iterator[Row]:
    """A picture's text is base64, or the "index" of the row that holds the picture."""
    columns: list[str] = []
    spans: dict[str, tuple[int, int]] = {}  # of rows with a picture of their own, by index
    for number, (span, fields) in enumerate(_tsv_records(path)):
        if not columns:
            columns = fields
            continue
        place = f"{path}, row {number}"
        if len(fields) != len(columns):
            raise ValueError(f"{place} has {len(fields)} fields, not the {len(columns)} of the first line")
        values = {column: value for column, value in zip(columns, fields, strict=True) if value.strip()}
        pictures, text = {}, values.pop("image", None)
        if text is not None:
            index = values.get("index", str(number))
            if len(text) > REFERENCE:
                spans[index] = span
            elif text not in spans:
                raise ValueError(f"{place}: its picture is that of row {text!r}, and no earlier row with this index has one")
            own = spans[index if len(text) > REFERENCE else text]
            read = partial(_picture_in_tsv, path, own, columns.index("image"))
            pictures["image"] = StoredPicture(f"{place}, image", read)
        yield Row(place, values, pictures)


def _tsv_records(path: Path) -> Iterator[tuple[tuple[int, int], list[str]]]:
    """Where each record lies, first byte and length, and its fields. One record may take several
    lines."""
    try:
        with _long_fields(), path.open("rb") as file:
            start = end = 0

            def lines() -> Iterator[str]:
                nonlocal end
                for line in iter(file.readline, b""):
                    end += len(line)
                    yield line.decode("utf-8-sig" if end == len(line) else "utf-8")

            for fields in csv.reader(lines(), delimiter="\t", strict=True):
                if fields:
                    yield (start, end - start), fields
                start = end
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table with tabs in UTF-8: {error}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields inside be as long as a picture in base64."""
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _picture_in_tsv(path: Path, span: tuple[int, int], column: int) -> bytes:
    with path.open("rb") as file:
        file.seek(span[0])
        record = file.read(span[1]).decode("utf-8")
    try:
        with _long_fields():
            text = next(csv.reader(io.StringIO(record, newline=""), delimiter="\t"))[column]
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"its text is no base64: {error}") from error
