"""Members of tar files, one after the other, from a file that may be a stream. What is not asked
for is passed over.

`tarfile` does the same at several times the cost of each header, and keeps a list of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

BLOCK = 512
PIECE = 2**20  # bytes read at a time where a stream cannot seek
REGULAR = (b"0", b"\0", b"7")  # types of members that are files
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
LONG_NAME, EXTENDED = b"L", b"x"
MOST_HEADER = 2**20  # bytes of a name or an extended header
MOST_CONTENT = 2**30  # bytes of a file that is read
END_MARK = 2 * BLOCK  # zeros that end an archive
PADDING = 20 * BLOCK  # writers fill an archive up to a multiple of this


class TarError(ValueError):
    """A tar file that is damaged, cut off or none."""


class TarMembers:
    """The files of a tar archive as pairs of name and size; `content` reads the one that came last.

    Plain tar, ustar, GNU and pax headers are read; other kinds of members (folders, links) are
    passed over. An archive may be followed by another one (`cat a.tar b.tar`). More zeros than
    writers end an archive with are what an unfinished download leaves.

    Args:
        file: at its beginning, or at the header of a member.

    Attributes:
        begun: where the headers of the member that came last begin, in bytes.

    Raises:
        TarError: where the archive is damaged, or ends without the mark of its end.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seekable = file.seekable()
        self.behind = 0  # bytes between the place of the file and the next header
        self.begun = 0

    def __iter__(self) -> Iterator[tuple[str, int]]:
        name: str | None = None
        size: int | None = None
        count = 0
        while True:
            header = self._header(count)
            if header is None:
                return
            if name is None and size is None:
                self.begun = self.file.tell() - BLOCK
            count += 1
            kind = header[156:157]
            length = 0 if kind in WITHOUT_CONTENT else _number(header[124:136])
            if length < 0:
                raise TarError(f"damaged: member {count} has no size")
            self._enter(length)
            if kind == LONG_NAME:
                name = _decoded(self._head(length).rstrip(b"\0"))
            elif kind == EXTENDED:
                name, size = _extended(self._head(length), name, size)
            else:
                if size is not None:
                    self._enter(size)
                if kind in REGULAR:
                    yield name or _name(header), self.size
                name = size = None

    def content(self) -> bytes:
        """The bytes of the member that came last, which can be read once."""
        if not 0 <= self.size <= MOST_CONTENT:
            raise TarError(f"a member of {self.size} bytes; at most {MOST_CONTENT} are read")
        found = self.file.read(self.size)
        if len(found) < self.size:
            raise TarError(f"cut off: it ends after {len(found)} of the {self.size} bytes of a member")
        self.behind -= self.size
        return found

    def _enter(self, size: int) -> None:
        self.size, self.behind = size, -(-size // BLOCK) * BLOCK

    def _header(self, count: int) -> bytes | None:
        """The next header; None at the end of the file."""
        self._pass()
        header, zeros = self.file.read(BLOCK), 0
        while header and header.count(0) == len(header):
            zeros += len(header)
            if zeros > END_MARK + PADDING:
                raise TarError(_hole(zeros, count, "more than"))
            header = self.file.read(BLOCK)
        if zeros and not header and count:
            return None
        if zeros and not header:
            raise TarError("it holds zeros alone")
        if zeros and zeros != END_MARK and (self.file.tell() - len(header)) % PADDING:
            raise TarError(_hole(zeros, count))
        if not header:
            raise TarError("empty" if count == 0 else f"cut off: it ends behind {count} members without the mark of its end")
        if len(header) < BLOCK:
            raise TarError(f"cut off: it ends within the header of member {count + 1}" if count else _no_tar(header))
        expected = sum(header) - sum(header[148:156]) + 8 * 32
        if _number(header[148:156]) != expected:
            raise TarError(f"damaged: what should be the header of member {count + 1} is none" if count else _no_tar(header))
        return header

    def _pass(self) -> None:
        if self.seekable and self.behind:
            self.file.seek(self.behind, 1)
            self.behind = 0
        while self.behind > 0:
            found = self.file.read(min(self.behind, PIECE))
            if not found:
                raise TarError(f"cut off: {self.behind} bytes of a member are missing")
            self.behind -= len(found)

    def _head(self, length: int) -> bytes:
        if length > MOST_HEADER:
            raise TarError(f"damaged: a name of {length} bytes")
        return self.content()


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (folder := header[345:500].split(b"\0", 1)[0]):
        name = folder + b"/" + name
    return _decoded(name)


def _decoded(name: bytes) -> str:
    """A name as text; bytes that are not UTF-8 as their numbers, so that it can be written anywhere."""
    return name.decode("utf-8", "backslashreplace")


def _number(field: bytes) -> int:
    """Octal digits, or with its first bit set a number of bytes (GNU); -1 for anything else."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:])
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _extended(content: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size as a pax header gives them: lines of "LENGTH NAME=VALUE", where the length is
    that of the line in bytes."""
    while content:
        length = content.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise TarError("damaged: an extended header that is none")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = _decoded(value)
        elif key == b"size":
            size = int(value) if value.isdigit() and len(value) < 20 else -1
            if size < 0:
                raise TarError(f"damaged: a member of {value[:40]!r} bytes")
        elif key.startswith(b"GNU.sparse"):
            raise TarError("members with holes (tar --sparse) are not read; write it without --sparse")
        content = content[int(length) :]
    return name, size


def _hole(zeros: int, count: int, least: str = "") -> str:
    found = f"{least} {zeros} zero bytes".lstrip()
    return f"damaged: {found} behind {count} members, as a download leaves that was not finished"


def _no_tar(header: bytes) -> str:
    return f"not a tar file: it begins with {header[:40]!r}"
