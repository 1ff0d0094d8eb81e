"""Shards: files of many samples that are read from the first to the last. Tar files as img2dataset
and webdataset write them.

A record is a mapping: "key", the sample's name in its shard, and one entry for each file extension
or column. Pictures stay the bytes of their files until they are needed.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from lightning_internvl.data.shards.names import ShardNames, Urls, protocol_of, without_query
from lightning_internvl.data.shards.records import DOUBLED, chats_of, pair_of
from lightning_internvl.data.shards.tar_members import MOST_CONTENT, TarError, TarMembers
from lightning_internvl.files import UnknownState, atomic_file, check_no_device

__all__ = ["Record", "ShardError", "Shards", "TarShards", "TarWriter", "chats_of", "pair_of"]

TARS = (".tar", ".tar.gz", ".tgz")
BUFFER = 2**18  # bytes that are read at a time from a local file
MOST_OF_ONE_NAME = 1000  # neighbouring files whose names are the same up to the first dot
KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^/.]+)\.([^/]*)")  # as webdataset splits names

Record = dict[str, Any]
Mark = tuple[int, int]  # the number of a record in its shard, and where it stands there


class ShardError(ValueError):
    """A shard that cannot be read, or not to its end.

    Args:
        shard: its name.
        reason: what is wrong with it.
    """

    kind = "broken shard"
    counts = True

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(f"shard {shard}: {reason}")
        self.shard, self.key, self.reason = shard, shard, reason

    def __reduce__(self) -> tuple[Any, ...]:
        # For the way from a data process to the training process
        return type(self), (self.shard, self.reason)


class Shards(ABC):
    """A source of shards."""

    @abstractmethod
    def __len__(self) -> int:
        """How many shards there are."""

    @abstractmethod
    def name(self, shard: int) -> str:
        """How a shard is called in messages."""

    @abstractmethod
    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        """The records of a shard from the `start`-th on, in their order.

        Raises:
            ShardError: after the records that were whole, if the shard cannot be read or ends
                early.
        """

    def identity(self) -> str:
        """What changes when the shards do; raises UnknownState where nothing tells."""
        raise UnknownState(f"{type(self).__name__} does not say whether its shards are still the same")

    def read_near(self, shard: int, start: int, mark: Mark) -> Iterator[Record]:
        """The same, given the attribute `mark` of a record up to the `start`-th, as it was read
        earlier: a source whose records have one need not look at what stands before it."""
        return self.read(shard, start)


class MarkedRecord(dict[str, Any]):
    """A record that knows where it stands."""

    mark: Mark


class TarShards(Shards):
    """Tar files; the files of one name up to its first dot, one after the other, are a record.
    Extensions are in lower case. Where an extension comes again, another record of that name
    begins, if it has the same files in the same order; if not, no one knows which files belong
    together, and all of them are one record, which `pair_of` and `chats_of` refuse.

    Args:
        urls: see `ShardNames`. Paths, and URLs of every protocol that fsspec has a package for; web
            servers must be able to send a part of a file.
    """

    def __init__(self, urls: Urls) -> None:
        self.names = ShardNames(urls, TARS)

    def __len__(self) -> int:
        return len(self.names)

    def identity(self) -> str:
        return self.names.identity()

    def name(self, shard: int) -> str:
        return self.names[shard]

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        return self.read_near(shard, start, (0, 0))

    def read_near(self, shard: int, start: int, mark: Mark) -> Iterator[Record]:
        name = self.names[shard]
        try:
            with _open_tar(name) as file:
                first, place = mark if file.seekable() else (0, 0)
                if place:
                    file.seek(place)
                yield from _records(TarMembers(file), start, first)
        except FileNotFoundError as error:
            # Which fsspec says so too
            cause = f", or cannot be reached: {error.__cause__!s:.120}" if error.__cause__ else ""
            raise ShardError(name, f"does not exist{cause}") from error
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise ShardError(name, str(error) or type(error).__name__) from error
        except Exception as error:  # each protocol has errors of its own
            raise ShardError(name, f"{type(error).__name__}: {error}") from error


@contextmanager
def _open_tar(name: str) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        if protocol_of(name) is None:
            check_no_device(name)
            file: IO[bytes] = stack.enter_context(open(name, "rb", buffering=BUFFER))
        else:
            import fsspec

            file = stack.enter_context(fsspec.open(name, "rb"))
        compressed = without_query(name).endswith("gz")
        yield cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if compressed else file


def _records(members: TarMembers, start: int, first: int = 0) -> Iterator[MarkedRecord]:
    """Neighbours of one name together, from record `first` on; before `start` headers alone."""
    files: list[tuple[str, MarkedRecord]] = []  # of one name, each with the record that it is in
    key, count = None, first
    for name, size in members:
        found = KEY_AND_EXTENSION.fullmatch(name)
        if found is None:
            continue
        if found[1] != key:
            for record in _split(files):
                if count >= start:
                    yield record
                count += 1
            files, key, seen, read, number = [], found[1], set[str](), 0, count - 1
        extension = found[2].lower()
        if not files or extension in seen:
            seen, number = set(), number + 1
            record = MarkedRecord(key=key)
            record.mark = number, members.begun
        seen.add(extension)
        files.append((extension, record))
        if number >= start and extension != "key":
            read += size
            if read > MOST_CONTENT or len(files) > MOST_OF_ONE_NAME:
                most = f"at most {MOST_OF_ONE_NAME} with {MOST_CONTENT} bytes in all are read"
                raise TarError(f"{len(files)} files of the name {found[1][:200]!r} with {read} bytes; {most}")
            record[extension] = members.content()
    yield from _split(files)[max(start - count, 0) :]


def _split(files: Sequence[tuple[str, MarkedRecord]]) -> list[MarkedRecord]:
    """The records of neighbouring files of one name: one, or several alike."""
    extensions = [extension for extension, _ in files]
    records = list({id(record): record for _, record in files}.values())
    alike = len(files) // len(records) if records else 0
    if extensions == extensions[:alike] * len(records):
        return records
    records[0][DOUBLED] = ", ".join(extensions[:20])
    return records[:1]


class TarWriter:
    """Writes records to a tar file, which appears when all are written, or not at all.

        with TarWriter("00000.tar") as tar:
            tar.write({"key": "000000000", "jpg": picture, "txt": "a cat", "json": {"score": 0.3}})

    Equal records give equal files. Texts are written in UTF-8, mappings and lists as JSON.
    """

    def __init__(self, path: str | Path) -> None:
        if protocol_of(str(path)) is not None:
            raise ValueError(f"{path}: shards are written to paths only, not to URLs")
        self.path = Path(path)
        self.written = 0

    def __enter__(self) -> TarWriter:
        self._open = contextlib.ExitStack()
        draft = self._open.enter_context(atomic_file(self.path))
        self._tar = self._open.enter_context(tarfile.open(draft, "w", format=tarfile.PAX_FORMAT))
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; its key may hold folders, but no dot behind the last of them.

        Raises:
            ValueError: for a key that would be read as another one, or a value that is no content
                of a file.
        """
        key = record["key"]
        for extension, value in record.items():
            if extension == "key" or value is None:
                continue
            found = KEY_AND_EXTENSION.fullmatch(f"{key}.{extension}")
            if found is None or found[1] != key:
                needs = "behind the last / there must be a name without a dot"
                raise ValueError(f"{key!r} cannot be the key of a record: {needs}")
            content = _content(value, f"{key}.{extension}")
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self.written += 1

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def _content(value: Any, name: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, Mapping | list | int | float):
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")  # as JSON does
    fault = f"{type(value).__name__} is no content of a file"
    raise ValueError(f"{name}: {fault}; give bytes, a text, or what JSON can hold")
