"""Files and folders that are whole or not there: written beside their place, then moved."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parent.parent / "conf"
RUN_CONFIG = "config.yaml"  # the resolved configuration of a run; a folder that holds it is a run
# why a file or folder cannot be written: no room, no right, too many files open, a broken disk
UNABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO}
TEMPORARY = "lightning_internvl_"  # begins the name of a folder for temporary files
DRAFT = ".draft"  # ends the name of what is not whole yet
LARGE = 2**26  # bytes of a file that is not read again while its size and times are the same


def runs_here(newest: int = 5) -> str:
    """The runs below outputs/, the newest last, as a message tells them."""
    configs = [path for depth in ("*", "*/*") for path in Path("outputs").glob(f"{depth}/{RUN_CONFIG}")]
    runs = [str(path.parent) for path in sorted(configs, key=lambda path: path.stat().st_mtime)]
    return f"runs here: {', '.join(runs[-newest:]) or 'none'}"


def errno_of(error: BaseException) -> int | None:
    """The number that the system gave an error of reading or writing, whatever library tells of
    it; None for another error, and for one that is told in words of ours."""
    if isinstance(error, OSError | ValueError):
        return getattr(error, "errno", None)
    said = str(error)
    if found := re.search(r"\(os error (\d+)\)", said):  # of Rust, as safetensors
        return int(found[1])
    return next((number for number in errno.errorcode if number in UNABLE and os.strerror(number) in said), None)


@contextlib.contextmanager
def naming(path: Path, draft: Path | None = None) -> Iterator[None]:
    """Let errors of writing inside name a file or folder, where systems and libraries name none or
    a draft of it.

    Raises:
        OSError: for them.
    """
    try:
        yield
    except Exception as error:
        number, named = errno_of(error), getattr(error, "filename", None)
        of_draft = draft is not None and str(named).startswith(str(draft))
        if number not in UNABLE or number is None or (named and not of_draft):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file to; moved when the block ends, removed if it fails."""
    draft = draft_of(path)
    with naming(path, draft):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `path`; moved there when the block ends, removed if it fails.

    Args:
        replace: whether an older folder is replaced. It cannot be in one step: `from_aside` finds
            it again should the process end in between.

    Raises:
        ValueError: if something other than an empty folder stands at `path` and is not to be
            replaced.
    """
    path = path.absolute()
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_drafts(path)
    from_aside(path)
    draft = draft_of(path)
    with naming(path, draft):
        draft.mkdir()
        try:
            yield draft
            if path.is_dir() and not replace:
                path.rmdir()
            into_place(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def draft_of(path: Path) -> Path:
    """Where this process writes what will stand at `path`: a sibling, because a move is one step
    within one file system only."""
    return path.with_name(f".{path.name}.{os.getpid()}{DRAFT}")


def check_no_device(path: str | Path) -> None:
    """Raise OSError for what is neither a file nor a folder: a pipe, a socket, a device, of which
    reading may never end."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("it is no file, but a pipe or a device")


def remove_drafts(path: Path) -> None:
    """Remove what processes that were killed have left beside `path`."""
    for left in path.parent.glob(f".{path.name}.*{DRAFT}"):
        remove(left)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step; halves of characters, which UTF-8 does not know, are spelt
    out."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_text(path: Path, text: str) -> None:
    """Add to a text file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("ab", buffering=0) as file:
        before, left = file.tell(), memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file, none where it is not there; what follows the last line end is one
    that a kill tore apart."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, numbers unrounded; halves of characters, which UTF-8 does not know, are
    kept as JSON spells them."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def into_place(draft: Path, path: Path) -> None:
    """Move a whole file or folder to its place, where an older one may stand. A folder cannot be
    replaced in one step; should the process end in between, `from_aside` finds the older one."""
    if not path.is_dir():
        draft.replace(path)
        return
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    draft.rename(path)
    shutil.rmtree(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def from_aside(path: Path) -> None:
    """Put an older folder back that a move has left beside its place."""
    if not path.exists() and _aside(path).exists():
        with contextlib.suppress(FileNotFoundError):  # another process has been faster
            _aside(path).rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.older")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, numbers unrounded."""
    write_text(path, json_text(value, indent=1) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """The contents of a JSON file, or the default where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def parsed_yaml(text: str) -> Any:
    """Plain values. The parser in C would take a fifth of the time, but of a hundred thousand brackets its
    stack overflows, which no program survives.

    Raises:
        yaml.YAMLError: if it is no YAML, or is nested too deeply.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def remove_all_but(path: Path, pattern: str) -> None:
    """Remove a file or a folder, but for files of this name."""
    if path.is_dir():
        for inner in path.iterdir():
            remove_all_but(inner, pattern)
        remove_if_empty(path)
    elif not path.match(pattern):
        path.unlink()


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


# --- whether something is still the same ----------------------------------------------------------


class UnknownState(ValueError):
    """Why nobody can tell whether something is still what it was."""


def identity_of(source: Any) -> Any:
    """What changes when the samples of a dataset, or of a source of shards, do beside its settings:
    plain values, by its method `identity()`.

    Raises:
        UnknownState: without that method, and for what it cannot tell.
    """
    if not callable(getattr(source, "identity", None)):
        raise UnknownState(f"{type(source).__qualname__} has no identity(), which says what its samples are made of")
    return source.identity()


def state_of(paths: Iterable[str | Path]) -> str:
    """What changes when one of many files does, as far as its name, size and time of change say."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{path}\0{state}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def content_of(path: Path, most: float = math.inf) -> str:
    """What changes when a byte of a file does, or of any file in a folder and its name there.

    Raises:
        UnknownState: where there are more than `most` bytes to read.
    """
    inside = path.rglob("*") if path.is_dir() else [path]
    files = sorted(file for file in inside if file.is_file() and "__pycache__" not in file.parts)
    if (size := sum(file.stat().st_size for file in files)) > most:
        raise UnknownState(f"the {size / 2**30:,.1f} GiB of {path} are compared only where reuse asks for it")
    if not path.is_dir():
        return _content(path)
    lines = (f"{file.relative_to(path)}\0{_content(file)}\0" for file in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _content(file: Path) -> str:
    found = file.stat()
    if found.st_size < LARGE:  # which may change within a tick of the clock
        return sha256_of(file)
    return _unchanged(file.resolve(), found.st_size, found.st_mtime_ns, found.st_ino)


@functools.cache
def _unchanged(file: Path, *state: int) -> str:
    return sha256_of(file)


def sha256_of(file: Path) -> str:
    """The hash of a file's bytes, which may be many."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
