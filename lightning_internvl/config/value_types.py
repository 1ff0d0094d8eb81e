"""Whether a setting's value is of the type that its class or function says, read from the annotation
in its source: nothing is imported."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

MOST = 2**63  # above all whole numbers that a tensor holds
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "None": "null"}
LISTS = ("list", "List", "Sequence", "tuple", "Tuple", "Collection", "Iterable")
MAPPINGS = ("dict", "Dict", "Mapping")
# What numbers of these names may be, whatever takes them: the smallest one, and the largest where
# there is one
BOUNDS: dict[tuple[float, float | None], tuple[str, ...]] = {
    (1, None): (
        "image_size", "patch_size", "dim", "depth", "heads", "mlp_dim", "embed_dim", "pool_heads", "num_queries", "head_dim",
        "encoder_dim", "decoder_dim", "vocab_size", "positions", "merge_size", "channels", "frames", "cross_every", "images",
        "every_n_steps", "max_text_tokens", "limit", "accumulate_grad_batches", "length", "num_nodes",
    ),
    (0, None): ("seed", "init_std", "embed_std", "log_every_n_steps", "gradient_clip_val", "eps", "weight_decay"),
    (1e-6, None): ("init_scale", "max_scale"),
    (0, 1): ("min_ratio", "drop_path", "dropout"),
}  # fmt: skip
NUMBERS = {name: bounds for bounds, names in BOUNDS.items() for name in names}


def type_fault(name: str, annotation: ast.expr, value: Any) -> str | None:
    """What is wrong with the value of a parameter; None for a fitting one, and for annotations of
    other types than those of YAML."""
    if not _fits(annotation, value):
        return f"must be {_said(annotation)}"
    least, most = NUMBERS.get(name, (None, None))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and least is not None and not least <= value <= (math.inf if most is None else most):
        return f"must be a number from {least:g} {'on' if most is None else f'to {most}'}"
    return None


def _fits(annotation: ast.expr, value: Any) -> bool:
    choices = _choices(annotation)
    if len(choices) > 1:
        return any(_fits(one, value) for one in choices)
    kind = _name(annotation)
    if isinstance(value, Mapping) and "_target_" in value:  # an object is built of it
        return True
    if isinstance(annotation, ast.Subscript) and kind == "Literal":
        return value in [ast.literal_eval(one) for one in _inner(annotation)]
    if kind in LISTS:
        return isinstance(value, list | tuple) and _each_fits(annotation, value)
    if kind in MAPPINGS:
        return isinstance(value, Mapping)
    return _is_plain(kind, value)


def _is_plain(kind: str, value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST
    known = {
        "int": whole,
        "float": whole or (isinstance(value, float) and value > -math.inf),  # inf: no limit
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "None": value is None,
    }
    return known.get(kind, True)


def _each_fits(annotation: ast.expr, values: Any) -> bool:
    inner = _inner(annotation)
    if _name(annotation) in ("tuple", "Tuple") and len(inner) > 1 and not isinstance(inner[-1], ast.Constant):
        return len(values) == len(inner) and all(map(_fits, inner, values))
    return not inner or all(_fits(inner[0], value) for value in values)


def _choices(annotation: ast.expr) -> list[ast.expr]:
    """The members of a union; of any other annotation itself."""
    if isinstance(annotation, ast.BinOp):
        return [*_choices(annotation.left), *_choices(annotation.right)]
    if _name(annotation) == "Union":
        return [one for inner in _inner(annotation) for one in _choices(inner)]
    if _name(annotation) == "Optional":
        return [*_choices(_inner(annotation)[0]), ast.Constant(None)]
    return [annotation]


def _inner(annotation: ast.expr) -> list[ast.expr]:
    if not isinstance(annotation, ast.Subscript):
        return []
    return list(annotation.slice.elts) if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]


def _name(annotation: ast.expr) -> str:
    found = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    if isinstance(found, ast.Constant):
        return str(found.value)
    return found.attr if isinstance(found, ast.Attribute) else getattr(found, "id", "")


def _said(annotation: ast.expr) -> str:
    """An annotation in the words of a user."""
    said = []
    for one in _choices(annotation):
        kind, inner = _name(one), _inner(one)
        if kind == "Literal":
            said += [ast.unparse(choice) for choice in inner]
        elif kind in LISTS:
            said.append(f"a list, each {_said(inner[0])}" if inner else "a list")
        else:
            said.append("a mapping" if kind in MAPPINGS else WORDS.get(kind, kind or "another object"))
    return " or ".join(dict.fromkeys(said))
