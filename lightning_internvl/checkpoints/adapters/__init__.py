"""Official checkpoint layouts, one module each. A new layout is one more file in this folder, or a
module of the user's own that offers an instance as `LAYOUT` and is trusted."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.name_rules import Config, Shapes, match_rules
from lightning_internvl.checkpoints.tied_tables import with_true_tie
from lightning_internvl.config.consent import trusted_names
from lightning_internvl.layers.peft import adapted_layers
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.vlm import VLM


def all_layouts() -> dict[str, Layout]:
    """The user's layouts and those of this folder by the names of their modules, which `layout=`
    takes.

    Raises:
        ValueError: for a layout of the user's own with the name of one of this folder.
    """
    own, shipped = own_layouts(), shipped_layouts()
    if same := own.keys() & shipped.keys():
        raise ValueError(f"the layouts {', '.join(same)} are known already; give your own modules other names")
    return own | shipped


def shipped_layouts() -> dict[str, Layout]:
    """The layouts of this folder."""
    return _offered(f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__))


def own_layouts() -> dict[str, Layout]:
    """The layouts of the packages and modules that the user trusts, which are imported here."""
    return _offered(name for name in dict.fromkeys(trusted_names()) if _is_module(name))


def _offered(modules: Iterable[str]) -> dict[str, Layout]:
    found = [getattr(import_module(name), "LAYOUT", None) for name in modules]
    return {layout.key: layout for layout in found if layout is not None}


def _is_module(name: str) -> bool:
    """Whether a trusted name is a module: it may be a class, a function or a hub id."""
    try:
        return "/" not in name and find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def known_layouts() -> str:
    """The layouts in one line, for error messages."""
    return "; ".join(f"{key}: {layout.NAME}" for key, layout in all_layouts().items())


def layout_of_checkpoint(config: Config, shapes: Shapes) -> Layout:
    """The layout that recognises a `config.json` and the tensors beside it.

    Raises:
        ValueError: if none does.
    """
    for layout in all_layouts().values():
        if layout.recognises(config, shapes):
            return layout
    kind = config.get("model_type")
    own = "one of your own is found with trust=[PACKAGE.MODULE]"
    raise ValueError(f"no layout is known for model_type={kind!r}; {own}; known layouts: {known_layouts()}")


def layout_of_model(
    model: VLM,
    key: str | None = None,
    *,
    single_file: bool = False,
) -> tuple[Layout, Config]:
    """The layout in which a model is written, and its config: the layout asked for, else the one
    that transformers loads, else the one that the model came in.

    Raises:
        ValueError: if no layout, or not the one asked for, can hold the model.
    """
    known = all_layouts()
    if key is not None and key not in known:
        raise ValueError(f"there is no layout {key!r}; valid choices: {', '.join(known)}")
    if layers := adapted_layers(model):
        held = f"adapters ({layers[0][0]}, ...), which no layout holds"
        raise ValueError(f"the model carries {held}; merge them into its weights")
    able = _layouts_that_hold(model, [known[key]] if key else list(known.values()), single_file)
    if key is None:  # a part that adds parameters to another may be mistaken for that one
        tensors = own_tensors(model)
        able = [pair for pair in able if not match_rules(pair[0].rules(pair[1]), tensors)[1]]
    if not able:
        parts = ", ".join(f"{name} {type(part).__name__}" for name, part in model.named_children())
        kind = "layout of one .pth file" if single_file else "layout of a folder"
        which = f"the layout {key} is none" if key else f"no {kind} is known"
        raise ValueError(f"{which} for a model of {parts}; known layouts: {known_layouts()}")
    came_in = model.config or {}
    layout, config = min(able, key=lambda pair: (not pair[0].NATIVE, not pair[0].recognises(came_in, {})))
    return layout, config if single_file else with_true_tie(config, model.decoder)


def _layouts_that_hold(model: VLM, layouts: list[Layout], single_file: bool) -> list[tuple[Layout, Config]]:
    # A decoder with more than transformers' parameters names the layouts that have a place for
    # them.
    named = getattr(model.decoder, "layouts", None)
    found: list[tuple[Layout, Config]] = []
    for layout in layouts:
        if single_file != layout.SINGLE_FILE or (named and layout.key not in named):
            continue
        config = layout.config_of(model)
        if config is not None:
            found.append((layout, config))
    return found
