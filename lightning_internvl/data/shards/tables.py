"""Shards of rows: parquet files, and data sets as the `datasets` library streams them. A column is
an entry of the record."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_internvl.data.files.parquet import check_pyarrow
from lightning_internvl.data.files.records import PARQUET
from lightning_internvl.data.shards.names import ShardNames, Urls, protocol_of
from lightning_internvl.data.shards.tar import Record, ShardError, Shards
from lightning_internvl.files import check_no_device

KEYS = ("key", "__key__", "id")  # columns with the name of a sample
ROWS = 64  # that are turned into Python values at a time


class ParquetShards(Shards):
    """Parquet files, read a row group at a time; a start in the middle opens its group.

    Args:
        urls: see `ShardNames`. Paths, and URLs of every protocol that fsspec has a package for.
        columns: only these, and the sample's key; None: all.
        by: what a shard is: `file`; or `row_group`, for few large files, which reads the end of
            each file at the start.

    Raises:
        ValueError: where pyarrow is not installed, or another kind of shard is asked for.
    """

    def __init__(self, urls: Urls, columns: Sequence[str] | None = None, by: str = "file") -> None:
        if by not in ("file", "row_group"):
            raise ValueError(f"{by=} is not known; valid choices: file, row_group")
        self.names = ShardNames(urls, PARQUET)
        check_pyarrow(self.names[0])
        self.columns = columns
        self.groups: list[tuple[int, int]] | None = None
        if by == "row_group":
            counts = [self._groups(file) for file in range(len(self.names))]
            self.groups = [(file, group) for file, n in enumerate(counts) for group in range(n)]

    def __len__(self) -> int:
        return len(self.names) if self.groups is None else len(self.groups)

    def identity(self) -> str:
        return self.names.identity()

    def name(self, shard: int) -> str:
        if self.groups is None:
            return self.names[shard]
        file, group = self.groups[shard]
        return f"{self.names[file]}, row group {group}"

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        file, chosen = (shard, None) if self.groups is None else self.groups[shard]
        with _as_shard_errors(self.name(shard)), _parquet(self.names[file]) as table:
            metadata, columns, row = table.metadata, self._columns(table.schema_arrow.names), 0
            for group in range(metadata.num_row_groups) if chosen is None else [chosen]:
                end = row + metadata.row_group(group).num_rows
                if end > start:
                    batches = table.iter_batches(ROWS, row_groups=[group], columns=columns, use_threads=False)
                    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
                    skipped = max(start - row, 0)
                    left = itertools.islice(rows, skipped, None)
                    for number, one in enumerate(left, row + skipped):
                        yield _record(one, number)
                row = end

    def _columns(self, names: Sequence[str]) -> list[str] | None:
        if self.columns is None:
            return None
        if missing := [name for name in self.columns if name not in names]:
            raise ValueError(f"there is no column {missing[0]!r} among {', '.join(names)}")
        return [name for name in names if name in self.columns or name in KEYS]

    def _groups(self, file: int) -> int:
        with _as_shard_errors(self.names[file]), _parquet(self.names[file]) as table:
            return table.metadata.num_row_groups


class HfShards(Shards):
    """A data set of the hub, or of local files, as the `datasets` library streams it. Pictures stay
    bytes; no code of it is run.

    Args:
        path: its name on the hub, a folder, or the kind of `data_files` (parquet, json, csv,
            imagefolder, webdataset).
        split: e.g. train.
        options: further arguments of `datasets.load_dataset`, such as name, data_files, revision.

    Raises:
        ValueError: where `datasets` is not installed, or cannot open the data set.
    """

    def __init__(self, path: str, split: str = "train", **options: Any) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"data set {path} needs a package: pip install -r requirements-datasets.txt") from error
        self.path, self.split = path, split
        try:
            self.table = datasets.load_dataset(path, split=split, streaming=True, **options).decode(False)
        except Exception as error:  # of the hub, of files and of formats
            raise ValueError(f"data set {path}, split {split}, cannot be opened: {error}") from error

    def __len__(self) -> int:
        return self.table.num_shards

    def name(self, shard: int) -> str:
        return f"{self.path}, {self.split}, part {shard} of {len(self)}"

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        part = self.table.shard(num_shards=len(self), index=shard)
        with _as_shard_errors(self.name(shard)):
            for number, row in enumerate(part.skip(start) if start else part, start):
                yield _record({name: self._read_bytes(value) for name, value in row.items()}, number)

    def _read_bytes(self, value: Any) -> Any:
        """A picture that is named by its path alone, with the bytes of its file, which must be on
        this machine or in the data set itself."""
        if not isinstance(value, Mapping) or set(value) != {"bytes", "path"}:
            return value
        if value["bytes"] is not None or not value["path"]:
            return value
        import fsspec

        place = str(value["path"])
        root, own = place.rpartition("::")[2], f"hf://datasets/{self.path}"  # of an archive
        if protocol_of(root) is not None and not root.startswith((f"{own}/", f"{own}@")):
            raise ValueError(f"a record names a picture at {root}, which is not fetched")
        with fsspec.open(place, "rb") as file:
            return {**value, "bytes": file.read()}


def _record(row: Mapping[str, Any], number: int) -> Record:
    """A row as a record; without a key of its own it is called by its number in the shard."""
    key = next((row[name] for name in KEYS if row.get(name) not in (None, "")), f"{number:09d}")
    return {**{name: value for name, value in row.items() if value is not None}, "key": str(key)}


@contextmanager
def _parquet(name: str) -> Iterator[Any]:
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        file: Any = name
        if protocol_of(name) is not None:
            import fsspec

            file = stack.enter_context(fsspec.open(name, "rb"))
        else:
            check_no_device(name)
        yield stack.enter_context(pyarrow.parquet.ParquetFile(file, page_checksum_verification=True))


@contextmanager
def _as_shard_errors(name: str) -> Iterator[None]:
    """Errors in reading a shard as those of the shard."""
    try:
        yield
    except FileNotFoundError as error:
        raise ShardError(name, "does not exist") from error
    except Exception as error:  # each format and protocol has errors of its own
        raise ShardError(name, f"cannot be read: {error}") from error
