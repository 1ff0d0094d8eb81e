"""Official checkpoint layouts, one module each. A new layout is one more file in this folder."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from lightning_internvl.checkpoints.name_rules import NameRule, match_rules
from lightning_internvl.layers.peft import adapted
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.vlm import VLM

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


class Adapter(Protocol):
    """What a module of this folder offers."""

    NAME: str  # for people; the module's name is what `layout=` takes
    NATIVE: bool  # whether transformers loads the layout by itself
    SINGLE_FILE: bool  # one .pth file instead of a folder with config.json

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """Whether a `config.json` (empty for a bare file) and the tensors are of this layout."""

    def canonical(self, name: str) -> str | None:
        """The name of a tensor in a file as the rules write it; None for what holds no weights (buffers of older releases)."""

    def build(self, config: Config, shapes: Shapes) -> VLM:
        """The model of a config, given the tensors in the files under their canonical names."""

    def rules(self, config: Config) -> list[NameRule]:
        """How tensors of the layout become ours and back."""

    def config_of(self, model: VLM) -> Config | None:
        """The `config.json` of a model, None if the layout cannot hold it."""


def adapters() -> dict[str, Adapter]:
    """The modules of this folder by name."""
    return {module.name: import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)}


def known_layouts() -> str:
    """The layouts in one line, for error messages."""
    return "; ".join(f"{name}: {adapter.NAME}" for name, adapter in adapters().items())


def adapter_for(config: Config, shapes: Shapes) -> Adapter:
    """The adapter that recognises a checkpoint.

    Raises:
        ValueError: if none does.
    """
    for adapter in adapters().values():
        if adapter.recognises(config, shapes):
            return adapter
    raise ValueError(f"no layout is known for model_type={config.get('model_type')!r}; known layouts: {known_layouts()}")


def layout_of(model: VLM, layout: str | None = None, *, single_file: bool = False) -> tuple[Adapter, Config]:
    """The adapter that writes a model, and the model's config: the layout asked for, else the one that transformers loads, else
    the one that the model came in.

    Raises:
        ValueError: if no layout, or not the one asked for, can hold the model.
    """
    known = adapters()
    if layout is not None and layout not in known:
        raise ValueError(f"there is no layout {layout!r}; valid choices: {', '.join(known)}")
    if layers := adapted(model):
        raise ValueError(f"the model carries adapters ({layers[0][0]}, ...), which no layout holds; merge them into its weights")
    holding = getattr(model.decoder, "layouts", None) or known  # a decoder with more than transformers' parameters names them
    able = {
        name: (adapter, config)
        for name, adapter in known.items()
        if name in holding
        if layout in (None, name) and single_file == adapter.SINGLE_FILE and (config := adapter.config_of(model)) is not None
        # Unless it was asked for: a part that adds parameters to another may be mistaken for that one.
        if layout is not None or not match_rules(adapter.rules(config), own_tensors(model))[1]
    }
    if not able:
        parts = ", ".join(f"{name} {type(part).__name__}" for name, part in model.named_children())
        kind = "layout of one .pth file" if single_file else "layout of a folder"
        which = f"the layout {layout} is none" if layout else f"no {kind} is known"
        raise ValueError(f"{which} for a model of {parts}; known layouts: {known_layouts()}")
    came_in = model.config or {}
    return min(able.values(), key=lambda pair: (not pair[0].NATIVE, not pair[0].recognises(came_in, {})))


def official(adapter: Adapter, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names (weights, or gradients) as the layout names and shapes them.

    Raises:
        ValueError: for names that the layout has no place for.
    """
    groups, homeless = match_rules(adapter.rules(config), tensors)
    if homeless:
        raise ValueError(f"the layout {adapter.NAME} has no place for: {', '.join(homeless[:20])}")
    return {name: tensor for group in groups for name, tensor in group.write(tensors).items()}


def updated(loaded: Config, defaults: Config, made: Config) -> Config:
    """A config as it was loaded, with what a model made of its parts says differently; absent fields count as their default."""
    config = dict(loaded)
    for key, value in made.items():
        if isinstance(value, dict) and isinstance(loaded.get(key), dict):
            config[key] = updated(loaded[key], defaults.get(key, {}), value)
        elif loaded.get(key, defaults.get(key)) != value:
            config[key] = value
    return config
