"""Matrices that stand in no layer of their own, as routers do, and experts for the methods that do
not reach them: what adapters and quantisation leave is told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_internvl.layers.expert_layers import ExpertLinear, expert_weights
from lightning_internvl.layers.quantization import frozen_experts, plain_name

LEAST = 0.01  # share of a part below which nothing is said
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def stacked_weights(part: nn.Module) -> dict[str, int]:
    """The numbers in such matrices by their names in files, below a part."""
    return {
        plain_name(f"{name}.{leaf}".lstrip(".")): parameter.numel()
        for name, module in part.named_modules()
        if not isinstance(module, _LAYERS) and ".lora_" not in f".{name}"
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and len(parameter) > 1 and not leaf.endswith("_bias")
    }


def unreached(model: nn.Module, settings: Mapping[str, Any], trained: Iterable[str]) -> list[str]:
    """What adapters and quantisation leave as it is, a line for each method that leaves much of a
    part; to be asked before anything is quantised.

    Args:
        settings: of the stage's parts: `peft` and `quantization` by part.
        trained: names of parameters, as files have them, that train.
    """
    trained, lines = set(trained), []
    for name, part in model.named_children():
        adapters, bits = ((settings.get(kind) or {}).get(name) for kind in ("peft", "quantization"))
        stacked = {n: count for n, count in stacked_weights(part).items() if f"{name}.{n}" not in trained}
        if adapters:
            adapted = {n for n, layer in part.named_modules() if isinstance(layer, ExpertLinear) and layer.lora_A}
            held = "stay frozen; listed under `train` they train whole"
            lines += _line(name, part, adapters["method"], {n: c for n, c in stacked.items() if n not in adapted}, held)
        if bits:
            reached = expert_weights(part) if bits == "bf16" else frozen_experts(name, part, bits, trained)
            left = {n: count for n, count in stacked.items() if n not in reached}
            lines += _line(name, part, bits, left, "stay in their own type")
    return lines


def _line(name: str, part: nn.Module, method: str, left: Mapping[str, int], held: str) -> list[str]:
    count, whole = sum(left.values()), sum(parameter.numel() for parameter in part.parameters())
    share = count / max(whole, 1)
    kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{n}").lstrip(".") for n in left})
    told = f"{name}: {method} does not reach {', '.join(kinds)}: {count:,} of {whole:,} parameters ({share:.0%}) {held}"
    return [told] if share >= LEAST else []
