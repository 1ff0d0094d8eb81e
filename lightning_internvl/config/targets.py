"""Classes and functions named by `_target_` in a configuration, and the settings that they take."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import hydra

from lightning_internvl.messages import ConfigError

OURS = ("lightning_internvl.", "callbacks.")
# of a configuration: words with a meaning for Hydra
BUILDS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
# How a class of the user's own comes to settings that are not its own
MERGED = "; settings of the file that it stands in for come along: ~PATH.NAME leaves one out, data=own has none"

# Where classes and functions that configurations of older runs name are today: modules, or single
# names in them.
_MOVED = {
    f"lightning_internvl.{old}": f"lightning_internvl.{new}"
    for old, new in {
        "data.any_resolution": "data.processors.any_resolution",
        "data.file_datasets": "data.files.datasets",
        "data.held_out": "data.scenes.held_out",
        "data.interleaved": "data.scenes.interleaved",
        "data.labelled": "data.files.labelled_folder",
        "data.labelled.SceneLabels": "data.scenes.labels.SceneLabels",
        "data.mixture": "data.order.mixture",
        "data.pad_square": "data.processors.padded",
        "data.padded": "data.processors.padded",
        "data.processors": "data.processors.basic",
        "data.scene_datasets": "data.scenes.datasets",
        "data.scene_language": "data.scenes.grounding",
        "data.streamed": "data.shards.datasets",
        "data.table_shards": "data.shards.tables",
        "optim": "training.optim",
        "stages.probe": "stages.supervised",
        "strategies": "distributed.fsdp2",
    }.items()
}


def current(target: str) -> str:
    """The path of today for what a configuration of an older run names."""
    module, dot, name = target.rpartition(".")
    return _MOVED.get(target) or f"{_MOVED.get(module, module)}{dot}{name}"


def with_current_targets(config: Any) -> Any:
    """A configuration in which every `_target_`, at any depth, has its path of today."""
    if isinstance(config, list | tuple):
        return [with_current_targets(value) for value in config]
    if not isinstance(config, Mapping):
        return config
    return {
        key: current(value) if key == "_target_" and isinstance(value, str) else with_current_targets(value)
        for key, value in config.items()
    }


def target_fault(target: Any) -> str | None:
    """What is wrong with a `_target_`; None for a text."""
    if isinstance(target, str):
        return None
    return f"_target_={target!r:.80} must be a dotted path of a class or function, as package.module.Class"


def locate(target: str) -> Any:
    """The class or function behind a dotted path.

    Raises:
        ValueError: if there is none.
    """
    if fault := target_fault(target):
        raise ValueError(fault)
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_: {target!r} cannot be found ({error})") from error


def parameters_of(target: str) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters of a class or function by name, and whether it takes any other name too.

    A class of this project that passes `**settings` on to its base class takes the names of that
    class as well.
    """
    found = locate(target)
    if not inspect.isclass(found):
        return _named(found)
    parameters: dict[str, inspect.Parameter] = {}
    for owner in (c for c in found.__mro__ if "__init__" in vars(c)):
        named, anything = _named(vars(owner)["__init__"])
        parameters |= {name: p for name, p in named.items() if name not in parameters}
        if not anything or not f"{owner.__module__}.".startswith(OURS):
            return parameters, anything
    return parameters, True


def _named(function: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    signature = inspect.signature(function).parameters
    parameters = {name: p for name, p in signature.items() if name != "self"}
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_arguments(config: Mapping[str, Any]) -> None:
    """Refuse settings that the class or function of a configuration does not take.

    Raises:
        ValueError: naming them and the valid ones.
    """
    parameters, anything = parameters_of(config["_target_"])
    unknown = sorted(k for k in config if k not in parameters and not k.startswith("_"))
    if unknown and not anything:
        fault = f"{config['_target_']} does not know {', '.join(unknown)}"
        choices = f"valid choices: {', '.join(parameters)}"
        own = not str(config["_target_"]).startswith(OURS)
        raise ValueError(f"{fault}; {choices}{MERGED if own else ''}")


def build(node: Mapping[str, Any], **extra: Any) -> Any:
    """The object of a configuration node; runtime objects pass by Hydra, which copies.

    Raises:
        ValueError: if the class does not take its settings.
    """

    check_arguments(node)
    maker = _maker(node)
    if node.get("_partial_") and not extra:
        return maker
    try:
        return maker(**extra)
    except ValueError:
        raise
    except Exception as error:  # of any kind, by parts and libraries that do not check what they are given
        raise ConfigError([f"{node['_target_']} cannot be built from its settings: {error}"]) from error


def _maker(node: Mapping[str, Any]) -> Any:
    """What makes the object of a node. Hydra copies each setting several times, which takes longer than all
    else of a small model: it finds the target alone where the settings are plain values."""
    settings = {name: value for name, value in node.items() if name not in ("_target_", "_partial_")}
    if not _is_plain(settings):
        return hydra.utils.instantiate(node, _partial_=True, _convert_="all")
    target = hydra.utils.instantiate({"_target_": node["_target_"], "_partial_": True})
    return functools.partial(target, **copy.deepcopy(settings))


def _is_plain(value: Any) -> bool:
    """Whether Hydra would hand on a value as it is: no object is made for it, and it refers to no other."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and name not in BUILDS and _is_plain(one) for name, one in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return "${" not in value and value != "???"
    return value is None or isinstance(value, bool | int | float)
