"""Matrices that stand in no layer of their own, as the experts of a block do, which transformers
holds in one tensor: adapters and quantisation, which replace layers, do not reach them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_internvl.layers.quantization import plain_name

LEAST = 0.01  # share of a part below which nothing is said
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def stacked_weights(part: nn.Module) -> dict[str, int]:
    """The numbers in such matrices by parameter name below a part."""
    return {
        f"{name}.{leaf}" if name else leaf: parameter.numel()
        for name, module in part.named_modules()
        if not isinstance(module, _LAYERS) and ".lora_" not in f".{name}"
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and len(parameter) > 1
    }


def unreached(model: nn.Module, settings: Mapping[str, Any], trained: Iterable[str]) -> list[str]:
    """What adapters and quantisation leave as it is, a line for each part, where it is much of one;
    to be asked before anything is quantised.

    Args:
        settings: of the stage's parts: `peft` and `quantization` by part.
        trained: names of parameters, as files have them, that train.
    """
    trained, lines = set(trained), []
    for name, part in model.named_children():
        adapters, bits = ((settings.get(kind) or {}).get(name) for kind in ("peft", "quantization"))
        methods = [*([adapters["method"]] if adapters else []), *([bits] if bits else [])]
        if not methods:
            continue
        stacked = stacked_weights(part)
        left = {n: count for n, count in stacked.items() if plain_name(f"{name}.{n}") not in trained}
        whole = sum(parameter.numel() for parameter in part.parameters())
        share = sum(left.values()) / max(whole, 1)
        if share < LEAST:
            continue
        kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{n}").lstrip(".") for n in left})
        held = f"{sum(left.values()):,} of {whole:,} parameters ({share:.0%}) stay frozen and in their own type"
        whole_too = "; listed under `train` they train whole" if adapters else ""
        reach = f"{' and '.join(methods)} reach{'es' * (len(methods) == 1)} linear layers"
        lines.append(f"{name}: {reach}; {', '.join(kinds)} are none: {held}{whole_too}")
    return lines
