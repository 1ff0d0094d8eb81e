"""Names of shards, from what a user writes: paths, URLs, brace patterns, globs, folders, lists of
them. No shard is opened."""

from __future__ import annotations

import bisect
import glob
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.files import UnknownState, check_no_device, state_of
from lightning_internvl.messages import HIDDEN

LISTS = (".txt", ".list")  # text files with one entry a line
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]*)(?:://|::)")

Urls = str | Path | Sequence[str | Path]


class ShardNames(Sequence[str]):
    """All names of a setting in order; brace patterns are not written out in memory.

    Args:
        urls: a path or URL, with {00000..00099} or {a,b} for many, or with `*`; a folder, which
            stands for the shards in it; a text file (.txt, .list) with one such entry a line, paths
            from its own folder on; or a list of these.
        suffixes: of the shards that a folder holds.

    Raises:
        ValueError: naming the entry that is broken, matches nothing, or needs a package that is
            missing.
    """

    def __init__(self, urls: Urls, suffixes: Sequence[str]) -> None:
        given = [urls] if isinstance(urls, str | Path) else list(urls)
        if not given:
            advice = "give a path, a URL, a pattern such as shards/{00000..00099}.tar, or a list"
            raise ValueError(f"the list of shards is empty; {advice}")
        if lacking := [one for one in map(str, given) if HIDDEN in one]:
            raise ValueError(f"{lacking[0]}: its secret is not kept in the run's folder; give the address again")
        entries = [entry for one in given for entry in _entries(str(one))]
        for protocol in {protocol_of(entry): entry for entry in entries}.items():
            _check_protocol(*protocol)
        self.groups = _merge_lists(group for entry in entries for group in _expand(entry, suffixes))
        self.ends = list(itertools.accumulate(len(group) for group in self.groups))
        if len(self) == 1 and protocol_of(self[0]) is None and not Path(self[0]).is_file():
            raise ValueError(f"shard {self[0]} does not exist")

    def __len__(self) -> int:
        return self.ends[-1]

    def identity(self) -> str:
        """Names, sizes and times of all files.

        Raises:
            UnknownState: for a URL, whose contents nobody watches.
        """
        if urls := [group[0] for group in self.groups if protocol_of(group[0]) is not None]:
            raise UnknownState(f"what {without_query(urls[0])} holds may have changed meanwhile")
        return state_of(self)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(f"shard {place} of {len(self)}")
        group = bisect.bisect_right(self.ends, place)
        return self.groups[group][place - (self.ends[group - 1] if group else 0)]


def _merge_lists(groups: Iterable[Sequence[str]]) -> list[Sequence[str]]:
    """The groups, neighbouring lists as one."""
    gathered: list[Sequence[str]] = []
    for group in groups:
        if isinstance(group, list) and gathered and isinstance(gathered[-1], list):
            gathered[-1] += group
        else:
            gathered.append(group)
    return gathered


class Braces(Sequence[str]):
    """The names that a pattern with braces stands for; the last brace changes fastest.

    Raises:
        ValueError: for a brace without its other half, or with something else than a range or a
            list in it.
    """

    def __init__(self, pattern: str) -> None:
        parts = BRACES.split(pattern)
        self.texts, self.choices = parts[::2], [_choices(inside, pattern) for inside in parts[1::2]]
        if any("{" in text or "}" in text for text in self.texts):
            raise ValueError(f"{pattern}: a brace without its other half, or one inside another")

    def __len__(self) -> int:
        return math.prod(len(choice) for choice in self.choices)

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(f"name {place} of {len(self)}")
        found = [self.texts[-1]]
        for text, choice in zip(self.texts[-2::-1], self.choices[::-1], strict=True):
            place, which = divmod(place, len(choice))
            found += [choice[which], text]
        return "".join(reversed(found))


class _Numbers(Sequence[str]):
    """Numbers as text, filled up with zeros to a width."""

    def __init__(self, numbers: range, width: int) -> None:
        self.numbers, self.width = numbers, width

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return str(self.numbers[place]).zfill(self.width)


def _choices(inside: str, pattern: str) -> Sequence[str]:
    if found := RANGE.fullmatch(inside):
        first, last, step = found.groups("1")
        if int(first) > int(last) or int(step) == 0:
            raise ValueError(f"{pattern}: {{{inside}}} does not rise; write {{first..last}}")
        padded = any(one.startswith("0") and len(one) > 1 for one in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return _Numbers(range(int(first), int(last) + 1, int(step)), width)
    if "," not in inside:
        kinds = "a range such as {000..099} nor a list such as {a,b}"
        raise ValueError(f"{pattern}: {{{inside}}} is neither {kinds}")
    return inside.split(",")


def protocol_of(url: str) -> str | None:
    """The first protocol of a URL; None for a path."""
    found = PROTOCOL.match(url)
    return found and found[1]


def without_query(url: str) -> str:
    """A URL of a web server without what follows its path (?signature=...); others as they are."""
    return url.partition("?")[0] if protocol_of(url) in ("http", "https") else url


def _check_protocol(protocol: str | None, url: str) -> None:
    if protocol is None:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(f"{url}: {protocol} needs a package that is not installed: {error}") from error
    except ValueError as error:
        known = fsspec.available_protocols()
        raise ValueError(f"{url}: the protocol {protocol!r} is unknown; choose from {known}") from error


def _entries(url: str) -> list[str]:
    """An entry as it is, or the lines of a text file."""
    if not without_query(url).endswith(LISTS) or BRACES.search(url) or _is_glob(url):
        return [url]
    try:
        text = read_text(url)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"list of shards {url} cannot be read: {error}") from error
    lines = [x for x in map(str.strip, text.splitlines()) if x and not x.startswith("#")]
    if not lines:
        raise ValueError(f"list of shards {url} is empty")
    folder = without_query(url).rpartition("/")[0]
    if not folder:
        return lines
    return [one if one.startswith("/") or protocol_of(one) else f"{folder}/{one}" for one in lines]


def read_text(url: str) -> str:
    """A text in UTF-8 at a path or URL."""
    if protocol_of(url) is None:
        check_no_device(url)
        return Path(url).read_text(encoding="utf-8-sig")
    import fsspec

    with fsspec.open(url, "r", encoding="utf-8") as file:
        return file.read()


def _is_glob(url: str) -> bool:
    path = without_query(url)
    return glob.has_magic(path.partition("://")[2] or path) and not (protocol_of(url) is None and Path(url).exists())


def _expand(entry: str, suffixes: Sequence[str]) -> list[Sequence[str]]:
    if BRACES.search(entry) or "{" in entry or "}" in entry:
        names = Braces(entry)
        return [_names_matching(name) for name in names] if _is_glob(entry) else [names]
    if _is_glob(entry):
        return [_names_matching(entry)]
    if not entry.endswith(tuple(suffixes)) and protocol_of(entry) is None and Path(entry).is_dir():
        files = Path(entry).rglob("*")
        found = sorted(str(file) for file in files if file.name.endswith(tuple(suffixes)))
        if not found:
            raise ValueError(f"{entry}: the folder holds no shard ({', '.join(suffixes)})")
        return [found]
    return [[entry]]


def _names_matching(pattern: str) -> list[str]:
    if protocol_of(pattern) is None:
        found = sorted(glob.glob(pattern, recursive=True))
    else:
        import fsspec

        try:
            files, _, _ = fsspec.get_fs_token_paths(pattern)
            found = sorted(files.unstrip_protocol(name) for name in files.glob(pattern))
        except Exception as error:  # each protocol has errors of its own
            raise ValueError(f"{pattern} cannot be listed: {error}") from error
    if not found:
        raise ValueError(f"{pattern} matches no file")
    return found
