"""Names of parameters by what they do, so that a rule holds for any part:
`encoder.@patch_embedding`, `middleware.@connector`.

A part says in its class attribute `roles` which of its names have a role (see
`lightning_internvl.protocols`). Rules with a role stand wherever names of parameters do: `train`,
`optimizer.part_lr`, `new`, `dropped`. In a part that has nothing of this role one applies to
nothing; a role that nobody knows is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_internvl.config.checks import PARTS
from lightning_internvl.console import console
from lightning_internvl.messages import did_you_mean

ROLES = {
    "patch_embedding": "of an encoder: the layer that makes a token of the pixels of a patch",
    "connector": "of a middleware: what hands tokens to the decoder; of one that does not say it, all",
    "generative": "of a middleware: what a contrast of pictures and captions does not use",
    "language_head": "of a middleware or a decoder: what chooses the next word",
    "word_table": "of a decoder: the embeddings of words",
}
WHOLE = "connector"  # a part that does not say what has this role has it as a whole
MARK = ".@"

Roles = Mapping[str, Mapping[str, tuple[str, ...]]]


def roles_of(classes: Mapping[str, type]) -> Roles:
    """The roles that parts give names, by part."""
    return {part: _declared(kind) for part, kind in classes.items()}


def model_roles(model: nn.Module) -> Roles:
    """The roles in a composed model, by part."""
    return roles_of({name: type(child) for name, child in model.named_children() if name in PARTS})


def _declared(kind: type) -> dict[str, tuple[str, ...]]:
    connector = getattr(kind, "connector", None)
    whole: dict[str, tuple[str, ...]] = {"connector": (connector,)} if connector else {}
    return whole | dict(getattr(kind, "roles", None) or {})


def has_role(pattern: Any) -> bool:
    """Whether a rule names a role instead of parameters."""
    return isinstance(pattern, str) and MARK in pattern


def names_of(pattern: str, roles: Roles, setting: str) -> tuple[str, ...]:
    """The name patterns behind a rule: itself, or those of its role, if the part has it.

    Args:
        setting: where the rule stands, for messages.

    Raises:
        ValueError: for a role that is not known, or a part that the model lacks.
    """
    if not has_role(pattern):
        return (pattern,)
    part, role = pattern.split(MARK, 1)
    if part not in roles:
        raise ValueError(f"{setting}: {pattern!r}: there is no part {part!r} here; valid choices: {', '.join(roles)}")
    own = roles[part]
    if role not in {**ROLES, **own}:
        raise ValueError(f"{setting}: {pattern!r}: there is no role {role!r}; {did_you_mean(role, {**ROLES, **own})}")
    if role not in own:
        if role == WHOLE:
            return (part,)
        _tell(f"{setting}: {pattern} applies to nothing, the {part} names no {role} among its roles")
        return ()
    return tuple(f"{part}.{name}" for name in own[role])


def all_names(patterns: Iterable[str], roles: Roles, setting: str) -> list[str]:
    """Several rules as name patterns."""
    return [name for pattern in patterns for name in names_of(pattern, roles, setting)]


@functools.cache
def _tell(line: str) -> None:
    """Print a line once in a process; a stage is assembled several times."""
    console.print(line, soft_wrap=True, markup=False)
