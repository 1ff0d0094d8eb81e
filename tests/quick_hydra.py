"""Hydra and OmegaConf in half their time, for tests, which compose thousands of configurations; what they compose is the same."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from hydra._internal import defaults_list
from omegaconf import DictConfig, ListConfig, OmegaConf, _utils, base, grammar_parser

_load, _choices = OmegaConf.load, defaults_list._create_interpolation_map


@functools.cache
def _pickled(text: str) -> bytes:
    return pickle.dumps(OmegaConf.create(text))


def load(file_: Any) -> Any:
    """A file of `conf/`, which every test reads; a pickled copy costs a seventh of a deep one."""
    return pickle.loads(_pickled(file_.read())) if hasattr(file_, "read") else _load(file_)


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


parse = functools.lru_cache(4096)(grammar_parser.parse)  # a tree of an interpolation is only read
QUICK = (
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
