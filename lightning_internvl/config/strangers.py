"""Another file of a group on the command line (`data=conversations`): what a recipe says for the
class that was there, and the new one does not take, is left out and told.

Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning_internvl.choices import PARTS
from lightning_internvl.config.given import GROUP, Given
from lightning_internvl.config.signatures import signature_of

Config = dict[str, Any]
KINDS = ("pairs", "chats", "labels", "held_out")  # objects of the data group


def leave_out_strangers(
    config: Config, given: Iterable[Given], recipe: Mapping[str, Any], stages: Iterable[str]
) -> Iterator[str]:
    """Change a configuration, and say what was left out. What the command line itself gives stays,
    to be refused by name.

    Args:
        recipe: what the file of the recipe says.
        stages: those that train.
    """
    given = list(given)
    chosen = {one.path[0] for one in given if one.kind == GROUP and len(one.path) == 1}
    kept = {one.path for one in given if one.kind != GROUP}
    for part in [part for part in PARTS if part in chosen]:
        known = _names(config[part], "tokenizer")
        yield from _cut(config[part], recipe.get(part), known, (part,), kept)
        for name in stages:
            own = config["stages"][name].get(part) or {}
            if "_target_" not in own:
                yield from _cut(own, own, known, ("stages", name, part), kept)
    own_parts = {one.path[1:] for one in given if one.kind == GROUP and one.path[0] == "stages"}
    for name, part in [(name, part) for name in stages for part in PARTS if (name, part) in own_parts]:
        node, told = config["stages"][name][part], (recipe.get("stages") or {}).get(name) or {}
        yield from _cut(node, told.get(part), _names(node, "tokenizer"), ("stages", name, part), kept)
    for kind in KINDS if "data" in chosen else ():
        node = config["data"].get(kind) or {}
        known = _names(node)
        yield from _cut(node, (recipe.get("data") or {}).get(kind), known, ("data", kind), kept)
        if not node:
            config["data"][kind] = None
        for name in stages:
            own = (config["stages"][name].get("datasets") or {}).get(kind) or {}
            if "_target_" not in own:
                yield from _cut(own, own, known, ("stages", name, "datasets", kind), kept)


def _names(node: Mapping[str, Any], *more: str) -> set[str] | None:
    """The settings that the class of a node takes: none without a class, None for any."""
    signature = signature_of(str(node["_target_"])) if "_target_" in node else None
    if "_target_" in node and (signature is None or signature.anything):
        return None
    return {*(signature.names if signature else ()), *more}


def _cut(
    node: Config,
    told: Mapping[str, Any] | None,
    known: set[str] | None,
    path: tuple[str, ...],
    kept: set[tuple[str, ...]],
) -> Iterator[str]:
    strange = [] if known is None else [key for key in told or {} if key in node and key not in known]
    names = [key for key in strange if not key.startswith("_") and (*path, key) not in kept]
    for key in names:
        del node[key]
    if names:
        yield f"{'.'.join(path)}: without {', '.join(names)} of the recipe, which the new choice does not take"
