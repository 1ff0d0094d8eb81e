"""Frozen weights in 4 or 8 bits (QLoRA, Dettmers et al. 2023; LLM.int8, Dettmers et al. 2022), with
the kernels of bitsandbytes, or in the 16 bits of bfloat16, which need no library.

Quantised once all weights are loaded. Files never hold quantised weights: they hold what the
quantised ones stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_internvl.layers.expert_layers import (
    HELD,
    Bf16Weight,
    StackedWeight,
    close_experts,
    expert_weights,
    experts_of,
    open_experts,
)
from lightning_internvl.layers.quantized_layers import (
    BLOCK,
    Bf16Linear,
    Bf16Table,
    Int8Head,
    Int8Table,
    Nf4Linear,
    Nf4Weight,
)

WRAPPED = ".base_layer."  # what PEFT puts into the names of the layers that it wraps

# Where the CPU has units for bf16, importing bitsandbytes misses a package of kernels that no layer
# here would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Quantized(NamedTuple):
    """What became of a part: layers and tables quantised, layers left because their rows are no
    whole blocks, and bytes."""

    changed: int
    left: int
    before: int
    after: int


def quantize(model: nn.Module, settings: Mapping[str, str | None] | None, keep: Iterable[str] = ()) -> dict[str, Quantized]:
    """Quantise the linear layers, experts and token embeddings of the parts that `settings` names, in
    place; vectors stay as they are, and experts with int8.

    Args:
        settings: by part: nf4, int8, bf16 or None. Embeddings take 8 bits with nf4 too, because 4
            cost them too much.
        keep: names of parameters, as files have them, that train and so cannot be quantised.
    """
    found = {}
    for name, method in (settings or {}).items():
        part = getattr(model, name, None)
        if not method or part is None:
            continue
        before, left = _bytes(part), len(_misfits(name, part, method, set(keep)))
        tables = _tables(part)
        _quantize_experts(part, method, frozen_experts(name, part, method, keep))
        for inner, layer in _frozen(name, part, method, set(keep)):
            if layer in tables:
                _quantize_table(part.lm, layer, tables, method)
            elif not _fits(layer, method):
                left += 1
            else:
                part.set_submodule(inner, _linear(layer, method))
        found[name] = Quantized(sum(map(is_quantized, part.modules())), left, before, _bytes(part))
    return found


def quantized_bytes(
    model: nn.Module, settings: Mapping[str, str | None] | None, keep: Iterable[str] = ()
) -> dict[nn.Parameter, int]:
    """What `quantize` would leave of each weight, in bytes with its scales; meta device too."""
    found = {}
    for name, method in (settings or {}).items():
        part = getattr(model, name, None)
        if not method or part is None:
            continue
        for weight in frozen_experts(name, part, method, keep).values():
            found[weight] = 2 * weight.numel() if method == "bf16" else _packed_bytes(weight)
        for _, layer in _frozen(name, part, method, set(keep)):
            weight, table = layer.weight, layer in _tables(part)
            if method == "bf16":
                found[weight] = 2 * weight.numel()
            elif method == "nf4" and not table and _fits(layer, method):
                found[weight] = _packed_bytes(weight)
            elif table or _fits(layer, method):
                found[weight] = weight.numel() + 4 * weight.shape[0]
    return found


def _packed_bytes(weight: Tensor) -> int:
    """Of codes and scales."""
    return weight.numel() // 2 + 4 * weight.numel() // BLOCK


def frozen_experts(name: str, part: nn.Module, method: str, keep: Iterable[str]) -> dict[str, nn.Parameter]:
    """The projections of experts that a method quantises, by name below a part: those that do not
    train and whose rows are whole blocks; bf16 those that are larger now. LLM.int8 has no experts."""
    kept = set(keep)
    frozen = {inner: weight for inner, weight in expert_weights(part).items() if f"{name}.{inner}" not in kept}
    if method == "bf16":
        return {inner: weight for inner, weight in frozen.items() if weight.dtype == torch.float32}
    return {inner: weight for inner, weight in frozen.items() if method == "nf4" and not weight.shape[-1] % BLOCK}


def _misfits(name: str, part: nn.Module, method: str, kept: set[str]) -> list[str]:
    """The projections of experts that NF4 has to leave because of their rows."""
    named = [inner for inner in expert_weights(part) if method == "nf4" and f"{name}.{inner}" not in kept]
    return [inner for inner in named if inner not in frozen_experts(name, part, method, kept)]


def _quantize_experts(part: nn.Module, method: str, chosen: Mapping[str, nn.Parameter]) -> None:
    for name, experts in list(experts_of(part)):
        own = [inner for inner in chosen if inner.rpartition(".")[0] == name]
        if own:
            open_experts(experts)
        for inner in own:
            weight = chosen[inner]
            held = Bf16Weight(weight) if method == "bf16" else Nf4Weight(weight)
            part.set_submodule(f"{inner}.held", held)


def _tables(part: nn.Module) -> tuple[Any, ...]:
    """Token embeddings and output layer of a language model."""
    lm = getattr(part, "lm", None)
    return () if lm is None else (lm.get_input_embeddings(), lm.get_output_embeddings())


def _fits(layer: nn.Linear, method: str) -> bool:
    """Whether a method can hold a linear layer."""
    return method == "bf16" or not layer.in_features % BLOCK


def _frozen(name: str, part: nn.Module, method: str, kept: set[str]) -> list[tuple[str, Any]]:
    """The layers of a part that can be quantised and do not train, by name; bf16 is for those that
    are larger now."""
    tables = _tables(part)
    return [
        (inner, layer)
        for inner, layer in part.named_modules()
        if layer in tables or (type(layer) is nn.Linear and ".lora_" not in inner)
        if method != "bf16" or layer.weight.dtype == torch.float32
        if not any(plain_name(f"{name}.{inner}.{leaf}") in kept for leaf, _ in layer.named_parameters(recurse=False))
    ]


def _bytes(part: nn.Module) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in (*part.parameters(), *part.buffers())}.values())


def _linear(layer: nn.Linear, method: str) -> nn.Module:
    if method == "bf16":
        return _short(layer)
    made: Any
    if method == "nf4":
        made = Nf4Linear(layer)
    else:
        import bitsandbytes as bnb

        sizes = layer.in_features, layer.out_features
        made = bnb.nn.Linear8bitLt(*sizes, bias=layer.bias is not None, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        made.bias = layer.bias
        made.to(layer.weight.device)  # it is the move that quantises
    made._forward_hooks.update(layer._forward_hooks)  # Partial LoRA acts by hooks
    return made


def _short(layer: nn.Linear | nn.Embedding) -> nn.Module:
    """A layer or table over the same parameter, which is in bfloat16 from now on."""
    layer.weight.data = layer.weight.data.to(torch.bfloat16)
    layer.weight.requires_grad_(False)
    if isinstance(layer, nn.Linear):
        return plain_linear(layer, layer.weight, Bf16Linear)
    table = Bf16Table(layer.num_embeddings, layer.embedding_dim, device="meta")
    table.weight = layer.weight
    return table


def plain_linear(layer: nn.Module, weight: Tensor, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A linear layer with this weight (O, I), and the bias, hooks and mode of `layer`.

    Args:
        weight: a parameter is taken as it is, so that what shares it goes on to share it; any other
            tensor does not train.
    """
    made = kind(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    is_one = isinstance(weight, nn.Parameter)
    made.weight = weight if is_one else nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias
    made._forward_hooks.update(layer._forward_hooks)  # Partial LoRA acts by hooks
    return made.train(layer.training)


def _quantize_table(lm: nn.Module, layer: Any, tables: tuple[Any, ...], method: str) -> None:
    """The input embeddings, with the output layer where they are tied, or an output layer of its
    own."""
    words, head = tables
    tied = head is not None and head.weight is words.weight
    if method == "bf16":
        if layer is words:
            lm.set_input_embeddings(_short(words))
        # the layer inside an adapter comes by itself
        if isinstance(head, nn.Linear) and (layer is words) == tied:
            lm.set_output_embeddings(_short(head))
    elif layer is words:
        table = Int8Table(words.weight.data)
        lm.set_input_embeddings(table)
        if tied:
            lm.set_output_embeddings(Int8Head(table, head.bias, tied=True))
    elif not tied:
        lm.set_output_embeddings(Int8Head(Int8Table(head.weight.data), head.bias, tied=False))


def plain_name(name: str) -> str:
    """The name of a parameter as files have it."""
    return name.replace(WRAPPED, ".").removesuffix(HELD)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer holds quantised weights."""
    return isinstance(layer, Int8Table | Nf4Weight | Bf16Linear | Bf16Table | Bf16Weight) or stays_whole(layer)


def stays_whole(layer: nn.Module) -> bool:
    """Whether the weights of a layer cannot be divided among devices: scales of LLM.int8 stand
    beside its parameter."""
    return type(layer).__name__ == "Linear8bitLt"


def dequantized_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer, or what its quantised weight stands for."""
    if isinstance(layer, Bf16Linear | Bf16Table | Bf16Weight):
        return layer.weight.detach().float()
    if not stays_whole(layer):
        return layer.weight.detach()
    weight: Any = layer.weight
    scale = (layer.state.SCB if weight.SCB is None else weight.SCB).float()
    return (weight.data.float() * scale[:, None] / 127).to(_dtype(layer))


def _dtype(layer: nn.Module) -> torch.dtype:
    return layer.bias.dtype if layer.bias is not None else torch.get_default_dtype()


def plain_experts(part: nn.Module) -> None:
    """Experts as transformers has them, with what their quantised weights stand for; those with
    adapters stay layers."""
    for name, layer in list(part.named_modules()):
        if name.endswith(".held") and is_quantized(layer):
            part.set_submodule(name, StackedWeight(nn.Parameter(dequantized_weight(layer), requires_grad=False)))
    close_experts(part)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold quantised weights, by their names without quantisation."""
    found = {name: layer for name, layer in model.named_modules() if is_quantized(layer)}
    return {name.removesuffix(".table"): layer for name, layer in found.items()}


def true_numel(name: str, parameter: Tensor) -> int:
    """Numbers that a parameter of this name stands for; packed ones take a half byte, and four bytes
    for each block."""
    if name.rpartition(".")[2] != "packed":
        return parameter.numel()
    return parameter.numel() * parameter.element_size() * BLOCK // (BLOCK // 2 + 4)
