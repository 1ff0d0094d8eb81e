"""What the user has named: packages whose code may be run, and places that may be read, because a
folder says so. Everything else that a folder names is refused (see `lightning_internvl.config.trust`).

Nothing here imports PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from lightning_internvl.messages import ConfigError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_HOST = re.compile(r"[A-Za-z][\w+.-]*://[^/\s'\"\]]*")  # of a URL, anywhere in a text
_WORD = re.compile(r"[\w./:@-]+")
_named: ContextVar[tuple[str, ...]] = ContextVar("trust", default=())
_parts: ContextVar[Mapping[str, str]] = ContextVar("parts", default={})  # noqa: B039 - nobody writes into it


class Untrusted(ConfigError):
    """Something that came with a folder and that the user has not named."""


@contextmanager
def trusting(names: Iterable[str]) -> Iterator[None]:
    """Trust packages and places inside, in addition to what is trusted already.

    Args:
        names: packages (`mine`, or `mine.parts` for a part of one) whose code may be imported and
            run with the settings of a folder; hub ids (`OWNER/NAME`) and hosts (`s3://BUCKET`)
            that may be read because a folder names them.
    """
    token = _named.set((*_named.get(), *map(str, names)))
    try:
        yield
    finally:
        _named.reset(token)


@contextmanager
def giving_parts(parts: Mapping[str, Any] | None) -> Iterator[None]:
    """Say inside where checkpoints find a part that their files lack, and that they only name:
    folders or hub ids by part, for which this is consent."""
    token = _parts.set({part: str(place) for part, place in (parts or {}).items() if place is not None} or _parts.get())
    try:
        yield
    finally:
        _parts.reset(token)


def given_parts() -> Mapping[str, str]:
    """The places of parts that are said here."""
    return _parts.get()


def trusted_names() -> tuple[str, ...]:
    """All that the user trusts here."""
    return _named.get()


def is_trusted(target: str) -> bool:
    """Whether the user has named a class or function, or the package of it."""
    return any(target == name or target.startswith(f"{name}.") for name in _named.get())


def trust_faults(names: Any) -> Iterable[str]:
    """Faults of the setting `trust`."""
    listed = isinstance(names, list)
    if not listed or not all(isinstance(name, str) and _WORD.fullmatch(name) for name in names):
        kinds = "packages, hub ids and hosts"
        yield f"trust={names!r} must be a list of {kinds}, as in trust=[my_package]"


def place_faults(path: str, place: Any) -> Iterator[str]:
    """Faults of a hub id that a folder names: it is fetched only if the user names it too, and else
    read from the cache, if it is there.

    Args:
        path: of the setting, for messages.
        place: what stands there; a path is no hub id.
    """
    if not isinstance(place, str) or not _HUB_ID.fullmatch(place) or Path(place).exists():
        return
    named = place in _named.get()
    if named or _is_cached(place):
        from lightning_internvl.hub import keep_offline  # which imports PyTorch

        keep_offline(place, not named)
        return
    found = f"{path}: {place!r} comes with the folder and is no folder on this machine"
    yield f"{found}; it is not fetched from the hub (if you want it, give trust=[{place}])"


def _is_cached(hub_id: str) -> bool:
    """Whether files of a hub id have been fetched before."""
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "tokenizer_config.json")
    return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)


def hosts_of(value: Any) -> list[str]:
    """The places that the URLs of a text name, as `trust` does: without a password or a path."""
    return [re.sub(r"//[^/]*@", "//", url) for url in _HOST.findall(value)] if isinstance(value, str) else []


def url_faults(path: str, value: Any) -> Iterator[str]:
    """Faults of the URLs in a text that a folder holds: what is read or written there is asked for
    by the user alone."""
    for host in hosts_of(value):
        is_local = host.startswith("file:") or host.endswith("//")  # as sqlite:///FILE is
        if not is_local and host not in _named.get():
            reason = f"{path}: a place at {host} comes with the folder; it is not asked"
            yield f"{reason} (if you want it, give trust=[{host}])"
