"""Records of a parquet file, read a row group at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.records import Records, ScannedRecord, digest_of

KEPT_BYTES = 2 * 2**30  # of decoded row groups, in each process


def check_pyarrow(path: str | Path) -> None:
    """Raises ValueError naming a file that needs it where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        install = "pip install -r requirements-parquet.txt"
        raise ValueError(f"{path}: parquet needs pyarrow: {install}") from error


class ParquetRecords(Records):
    """One record a row; columns are the names. Row groups that were read are kept up to 2 GiB.

    Raises ValueError naming the file where it is missing or damaged, and where pyarrow is not
    installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.root = self.path.parent
        if not self.path.is_file():
            raise ValueError(f"list {path} does not exist")
        self._opened: Any = None
        self._ends: list[int] = []
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._file()

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the file itself
        return {**self.__dict__, "_opened": None, "_kept": OrderedDict()}

    def __len__(self) -> int:
        return self._file().metadata.num_rows

    def read(self, position: int) -> tuple[dict[str, Any], int]:
        if not 0 <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        group = next(number for number, end in enumerate(self._ends) if position < end)
        table = self._group(group)
        place = position - (self._ends[group] - table.num_rows)
        try:
            return table.slice(place, 1).to_pylist()[0], position + 1
        except Exception as error:  # a text that is none, a date beyond all
            raise BadSample(f"{self.name(position + 1)} is damaged: {error}", "broken line", self.key(position + 1)) from error

    def scan(self) -> Iterator[ScannedRecord]:
        for position in range(len(self)):
            try:
                yield ScannedRecord(position + 1, self.read(position)[0])
            except BadSample as error:
                yield ScannedRecord(position + 1, None, error)

    def digest(self, position: int) -> int:
        return digest_of(f"{self.path.name}:{position}".encode())

    def name(self, line: int) -> str:
        return f"{self.path}, row {line}"

    def _file(self) -> Any:
        if self._opened is None:
            check_pyarrow(self.path)
            import pyarrow
            import pyarrow.parquet

            try:
                self._opened = pyarrow.parquet.ParquetFile(self.path, page_checksum_verification=True)
            except Exception as error:  # pyarrow has many
                raise ValueError(f"{self.path} is no parquet file, or damaged: {error}") from error
            groups = self._opened.metadata
            rows = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
            self._ends = [sum(rows[: number + 1]) for number in range(len(rows))]
        return self._opened

    def _group(self, number: int) -> Any:
        if number not in self._kept:
            try:
                self._kept[number] = self._file().read_row_group(number)
            except Exception as error:  # pyarrow has many
                raise BadSample(f"{self.path}, row group {number}, is damaged: {error}", "broken line") from error
            while len(self._kept) > 1 and sum(x.nbytes for x in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]
