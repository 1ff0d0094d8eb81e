"""Where features are kept: in memory, or in files that several processes and runs share. Both let
go of what was not asked for longest when they are full."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_internvl.console import console
from lightning_internvl.files import atomic_file

Entry = list[Tensor]
ROOM = 0.9  # of the limit that a full disk store is brought down to
# a process looks what others have written each time it has written this part of the limit
SHARE = 64


class MemoryStore:
    """Features in the memory of this process.

    Args:
        limit: bytes.

    Attributes:
        dropped: how many were let go.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.dropped = limit, 0, 0
        self.entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, name: str) -> Entry | None:
        """What is kept under a name."""
        if name in self.entries:
            self.entries.move_to_end(name)
        return self.entries.get(name)

    def put(self, name: str, entry: Entry) -> None:
        """Keep something; what alone exceeds the limit is not kept."""
        size = _size(entry)
        if name in self.entries or size > self.limit:
            return
        while self.used + size > self.limit:
            self.used -= _size(self.entries.popitem(last=False)[1])
            self.dropped += 1
        self.entries[name] = entry
        self.used += size


class DiskStore:
    """Features in files, one a picture, in safetensors; a file is whole or not there.

    Processes that share a folder know of each other's files from looking: together they may exceed
    the limit for a while, by at most its 64th part for each.

    Args:
        folder: made where it is missing; anything else in it is left alone.
        limit: bytes.

    Attributes:
        used: bytes in use, as this process knows.
        dropped: how many it has let go.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.used, self.written, self.dropped = 0, 0, 0
        self.full = False  # the disk, which then takes no more
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Entry | None:
        """What is kept under a name. A damaged file is removed and counts as missing."""
        path = self._path(name)
        try:
            found = load(path.read_bytes())
            os.utime(path)  # asked for now
        except FileNotFoundError:
            return None
        except SafetensorError:
            path.unlink(missing_ok=True)
            return None
        return [found[str(place)] for place in range(len(found))]

    def put(self, name: str, entry: Entry) -> None:
        """Keep something, unless it alone exceeds the limit or the room of the disk."""
        if self.full or _size(entry) > self.limit:
            return
        if self.used == 0 or self.written > self.limit // SHARE:
            self._make_room()
        path = self._path(name)
        try:
            with atomic_file(path) as draft:
                draft.write_bytes(save({str(place): tensor for place, tensor in enumerate(entry)}))
        except OSError as error:
            self.full = True
            why = f"{self.folder} takes no more files ({error})"
            said = f"feature cache: {why}; what is missing is computed each time"
            console.print(said, soft_wrap=True, markup=False)
            return
        self.used += _size(entry)
        self.written += _size(entry)
        if self.used > self.limit:
            self._make_room()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _make_room(self) -> None:
        """Count what there is and, if it is too much, remove what was not asked for longest."""
        files = []
        for path in self.folder.glob("??/*.safetensors"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process has removed it
                continue
            files.append((found.st_mtime_ns, found.st_size, path))
        self.used, self.written = sum(size for _, size, _ in files), 0
        if self.used <= self.limit:
            return
        for _, size, path in sorted(files):
            if self.used <= ROOM * self.limit:
                break
            path.unlink(missing_ok=True)
            self.used -= size
            self.dropped += 1


def _size(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry)
