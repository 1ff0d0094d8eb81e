"""Hydra, OmegaConf and PyYAML in a fifth of their time, for tests, which compose thousands of times; the result is the same."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, ListConfig, OmegaConf, _utils, base, grammar_parser


class Kept:
    """A configuration of which many copies are taken. Classes stay those they are: Hydra imports its plugins, which define some,
    more than once, and a pickle by their names is refused then."""

    class _Pickler(pickle.Pickler):
        def __init__(self, file: io.BytesIO, classes: list[type]) -> None:
            super().__init__(file)
            self.classes = classes

        def persistent_id(self, one: Any) -> int | None:
            if not isinstance(one, type):
                return None
            self.classes.append(one)
            return len(self.classes) - 1

    class _Unpickler(pickle.Unpickler):
        def __init__(self, file: io.BytesIO, classes: list[type]) -> None:
            super().__init__(file)
            self.persistent_load = classes.__getitem__

    def __init__(self, config: Any) -> None:
        file, self.classes = io.BytesIO(), list[type]()
        self._Pickler(file, self.classes).dump(config)
        self.content = file.getvalue()

    def copy(self) -> Any:
        return self._Unpickler(io.BytesIO(self.content), self.classes).load()


CONF = str(Path(__file__).resolve().parents[1] / "conf")
_load, _choices, _safe_load = OmegaConf.load, defaults_list._create_interpolation_map, yaml.safe_load
_listed, _merged = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
_lists: dict[Any, Any] = {}
_merges: dict[str, Kept] = {}


@functools.cache
def _pickled(text: str) -> bytes:
    return pickle.dumps(OmegaConf.create(text))


def load(file_: Any) -> Any:
    """A file of `conf/`, which every test reads; a pickled copy costs a seventh of a deep one."""
    return pickle.loads(_pickled(file_.read())) if hasattr(file_, "read") else _load(file_)


@functools.lru_cache(4096)
def _read(text: str) -> bytes:
    return pickle.dumps(_safe_load(text))


def safe_load(stream: Any) -> Any:
    """A text as YAML, which the parser of the project, in Python, reads once."""
    return pickle.loads(_read(stream if isinstance(stream, str) else stream.read()))


def choices(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
    """The choices so far, for a defaults list that refers to them; Hydra makes a configuration of them for every file."""
    refers = any(not one.is_virtual() and one.is_interpolation() for one in defaults)
    return _choices(overrides, defaults, self_added) if refers else OmegaConf.create()


def copied(self: base.Metadata, memo: dict[int, Any]) -> base.Metadata:
    """What OmegaConf notes of a node: types and flags, of which the flags alone change."""
    made = copy.copy(self)
    made.flags = None if self.flags is None else dict(self.flags)
    made.resolver_cache = copy.deepcopy(self.resolver_cache, memo) if self.resolver_cache else defaultdict(dict)
    return made


def take_children(self: base.Box) -> None:
    """Become the parent of all below, after each merge, without asking the classes of all of them through `abc`."""
    content = vars(self)["_content"]
    for child in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        own = vars(child)
        own["_parent"] = self
        if own["_flags_cache"] is not None:
            child._invalidate_flags_cache()
        if "_content" in own:
            child._re_parent()


def _is_own(repo: Any) -> bool:
    """Whether all files come from `conf/` and from packages, which do not change."""
    return all(source.path == CONF or source.scheme() != "file" for source in repo.get_sources())


def listed(repo: Any, config_name: str | None, overrides_list: Sequence[Any], **ways: bool) -> Any:
    """The files that a configuration consists of: the same wherever the same words choose files."""
    words = [one for one in overrides_list if not one.is_sweep_override()]
    chosen = [one for one in words if repo.group_exists(one.key_or_group) and not isinstance(one.value(), dict)]
    key = config_name, *(one.input_line for one in chosen), *ways.items()
    if not _is_own(repo):
        return _listed(repo, config_name, overrides_list, **ways)
    if key not in _lists:
        _lists[key] = _listed(repo, config_name, overrides_list, **ways)
    return dataclasses.replace(_lists[key], config_overrides=[one for one in words if one not in chosen])


def merged(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    """These files merged."""
    if not _is_own(repo):
        return _merged(self, defaults, repo)
    key = str(defaults)
    if key not in _merges:
        _merges[key] = Kept(_merged(self, defaults, repo))
    return _merges[key].copy()


parse = functools.lru_cache(4096)(grammar_parser.parse)  # a tree of an interpolation is only read
QUICK = (
    (config_loader_impl, "create_defaults_list", listed),
    (ConfigLoaderImpl, "_compose_config_from_defaults_list", merged),
    (yaml, "safe_load", safe_load),
    (OmegaConf, "load", staticmethod(load)),
    (defaults_list, "_create_interpolation_map", choices),
    (base, "parse", parse),
    (_utils, "parse", parse),
    (DictConfig, "_re_parent", take_children),
    (ListConfig, "_re_parent", take_children),
    (base.Metadata, "__deepcopy__", copied),
)
PLAIN = tuple((owner, name, vars(owner).get(name)) for owner, name, _ in QUICK)  # None: it has none of its own


def put(pieces: Iterable[tuple[Any, str, Any]]) -> None:
    for owner, name, piece in pieces:
        if piece is None:
            delattr(owner, name)
        else:
            setattr(owner, name, piece)


@contextlib.contextmanager
def as_published() -> Iterator[None]:
    """Hydra and OmegaConf as they are, inside."""
    put(PLAIN)
    try:
        yield
    finally:
        put(QUICK)


put(QUICK)
