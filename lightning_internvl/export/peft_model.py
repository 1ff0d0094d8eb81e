"""Adapters put on a model of transformers by PEFT, as its folders hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_internvl.hub import quiet
from lightning_internvl.layers import peft
from lightning_internvl.layers.expert_layers import for_peft
from lightning_internvl.messages import first_of


@dataclass(frozen=True)
class Update:
    """One adapter: a weight gets `alpha / rank` times B A.

    Attributes:
        a: (r, I); of experts (E, r, I), or turned (E, I, r)
        b: (O, r); of experts (E, O, r), or turned (E, r, O)
        magnitude: (O,) with DoRA
    """

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """r, the smaller side of A."""
        return min(self.a.shape[-2:]) if self.stacked else len(self.a)

    @property
    def stacked(self) -> bool:
        """Whether it is of all experts of a block."""
        return self.a.ndim == 3


def wrap_with_peft(stock: nn.Module, updates: Mapping[str, Update], saved: Mapping[str, Tensor]) -> Any:
    """PEFT's model around one of transformers, with these adapters and these tensors.

    Raises:
        ValueError: for a trained tensor beside adapted layers, which PEFT would only save with all of
            these (LLaVA-NeXT's `image_newline`).
    """
    library, first = peft.peft_library(), next(iter(updates.values()))
    shared = {parameter.data_ptr(): name for name, parameter in stock.named_parameters()}
    saved = dict(saved)
    # a table that is tied stays one
    for name, parameter in stock.named_parameters(remove_duplicate=False):
        if (twin := shared[parameter.data_ptr()]) in saved:
            saved.setdefault(name, saved[twin])
    modules = owning_modules(saved)
    if swallowed := [name for name in saved if any(layer.startswith(f"{name.rpartition('.')[0]}.") for layer in updates)]:
        held = f"{first_of(swallowed)} belongs to no layer of its own, and PEFT saves whole layers only"
        raise ValueError(f"adapter=true: {held}; export with adapter=false, or train with it frozen (module.train)")
    settings = library.LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={name: u.rank for name, u in updates.items() if u.rank != first.rank},
        alpha_pattern={name: u.alpha for name, u in updates.items() if u.alpha != first.alpha},
        use_dora=first.magnitude is not None,
        target_modules=[name for name, u in updates.items() if not u.stacked],
        target_parameters=[name for name, u in updates.items() if u.stacked] or None,
        modules_to_save=modules or None,
    )
    with quiet():
        wrapped = library.get_peft_model(stock, settings, adapter_name=peft.NAME).eval()
    inside = wrapped.base_model.model
    with torch.no_grad():
        for name, update in updates.items():
            layer = _experts_layer(inside, name) if update.stacked else inside.get_submodule(name)
            a, b = for_peft(update.a, update.b) if update.stacked else (update.a, update.b)
            layer.lora_A[peft.NAME].weight.copy_(a)
            layer.lora_B[peft.NAME].weight.copy_(b)
            if update.magnitude is not None:
                layer.lora_magnitude_vector[peft.NAME].weight.copy_(update.magnitude)
        for name, tensor in saved.items():
            owner = next(module for module in modules if name.startswith(f"{module}."))
            own = inside.get_submodule(owner).modules_to_save[peft.NAME]
            own.get_parameter(name.removeprefix(f"{owner}.")).copy_(tensor)
    return wrapped


def _experts_layer(model: nn.Module, name: str) -> Any:
    """PEFT's layer over a parameter; those of one module lie inside each other."""
    owner, _, kind = name.rpartition(".")
    layer: Any = model.get_submodule(owner)
    while layer.parameter_name != kind:
        layer = layer.base_layer
    return layer


def owning_modules(names: Iterable[str]) -> list[str]:
    """The outermost modules that directly hold parameters of these names."""
    found = sorted({name.rpartition(".")[0] for name in names}, key=len)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
