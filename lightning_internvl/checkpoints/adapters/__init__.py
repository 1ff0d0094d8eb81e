"""Official checkpoint layouts, one module each. A new layout is one more file in this folder."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Protocol

from lightning_internvl.model import VLM

Config = dict[str, Any]


class Adapter(Protocol):
    """What a module of this folder offers."""

    NAME: str
    IGNORED: tuple[str, ...]  # patterns of official names that hold no weights (buffers of older releases)
    SCALARS: frozenset[str]  # official names without a dimension; ours have one, because sharding refuses scalars

    def recognises(self, config: Config) -> bool:
        """Whether a `config.json` is of this layout."""

    def build(self, config: Config, names: set[str]) -> VLM:
        """The model of a config, given the names in the weight files."""

    def config_of(self, model: VLM) -> Config | None:
        """The `config.json` of a model, None if the layout cannot hold it."""

    def to_ours(self, name: str) -> str | None:
        """Our name of an official tensor, None if the layout has no such tensor."""

    def to_official(self, name: str) -> str | None:
        """The official name of one of our tensors, None if the layout has no place for it."""


def adapters() -> list[Adapter]:
    """The modules of this folder, by name."""
    return [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]


def known_layouts() -> str:
    """The layouts in one line, for error messages."""
    return "; ".join(adapter.NAME for adapter in adapters())


def adapter_for(config: Config) -> Adapter:
    """The adapter that recognises a config.

    Raises:
        ValueError: if none does.
    """
    for adapter in adapters():
        if adapter.recognises(config):
            return adapter
    raise ValueError(f"no layout is known for model_type={config.get('model_type')!r}; known layouts: {known_layouts()}")


def layout_of(model: VLM) -> tuple[Adapter, Config]:
    """The adapter that can write a model, and the model's config.

    Raises:
        ValueError: if no layout can hold the model.
    """
    for adapter in adapters():
        if (config := adapter.config_of(model)) is not None:
            return adapter, config
    parts = ", ".join(f"{name} {type(part).__name__}" for name, part in model.named_children())
    raise ValueError(f"no official layout is known for a model of {parts}; known layouts: {known_layouts()}")


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """`name` with the first fitting old part replaced: a prefix if it ends in a dot, else the whole name."""
    for old, new in pairs:
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name[len(old) :]
    return None
