"""Configurations of transformers, made of fields that a user or a folder gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_internvl.layers.config_values import check_values
from lightning_internvl.messages import check_choice

ROPES = ("rope_parameters", "rope_scaling")


def make_config(configs: Any, fields: Mapping[str, Any], what: str) -> Any:
    """A configuration of transformers.

    Args:
        configs: `AutoConfig`, or what offers its `for_model`.
        fields: `model_type` among them.
        what: they are called in messages.

    Raises:
        ValueError: for fields of which the library makes none.
    """
    own = dict(fields)
    kind = own.pop("model_type", None)
    if not isinstance(kind, str) or (configs is AutoConfig and kind not in CONFIG_MAPPING):
        raise ValueError(f"{what}.model_type={kind!r} is no architecture of transformers; as it writes them: llama, qwen2")
    # of null and of lists, one number a layer, the library knows where they may stand
    check_values({name: value for name, value in own.items() if isinstance(value, bool | int | float | str)}, what)
    for rope in filter(None, map(own.get, ROPES)):
        _check_rope(rope, f"{what}.rope_scaling")
    try:
        made = configs.for_model(kind, **own)
    except (StrictDataclassError, AttributeError, KeyError, TypeError) as error:  # which the library leaves bare
        raise ValueError(f"{what}: transformers makes no {kind!r} of these fields: {' '.join(str(error).split())}") from error
    _check_fit(made, what)
    return made


def _check_rope(rope: Any, what: str) -> None:
    if not isinstance(rope, Mapping):
        raise ValueError(f"{what}={rope!r:.80} must be a mapping, as {{rope_type: linear, factor: 2.0}}")
    for name in ("rope_type", "type"):
        if name in rope:
            check_choice(f"{what}.{name}", rope[name], ["default", "mrope", *ROPE_INIT_FUNCTIONS])


def _check_fit(config: Any, what: str) -> None:
    """Raise ValueError for numbers that do not fit each other and of which the library makes a model
    all the same, or fails without saying so."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(heads, int) and not 0 < heads <= width:
        raise ValueError(f"{what}: num_attention_heads={heads} must be from 1 to hidden_size={width}")
    rows, padding = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if isinstance(rows, int) and isinstance(padding, int) and not -rows <= padding < rows:
        raise ValueError(f"{what}: pad_token_id={padding} must be below vocab_size={rows}")
