"""Low-rank adapters on any part: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), with the layers
of the PEFT library.

Adapted parts keep the plain names of their weights in every file, beside those of the updates
(`...q_proj.lora_A.default.weight`), so weights go from a stage without adapters to one with them
and, merged, back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_internvl.layers.expert_layers import (
    NAME,
    ExpertLinear,
    close_experts,
    expert_weights,
    experts_of,
    open_experts,
    update_of,
)
from lightning_internvl.layers.quantization import WRAPPED, dequantized_weight, plain_linear, plain_name

UPDATES = ("lora_A", "lora_B", "lora_magnitude_vector")
BLOCKS = "blocks"  # the target that stands for every linear layer of a part's blocks, experts too

Settings = Mapping[str, Any]


def add_adapters(model: nn.Module, settings: Mapping[str, Settings | None] | None) -> None:
    """Put adapters, which change nothing when fresh, on the parts that `settings` names.

    Args:
        settings: by part: `method` (lora or dora), `rank`, `alpha` (updates count alpha / rank),
            `dropout` (of what they read, while training) and `targets`: names of linear layers and
            projections of experts below the part, with `*`, or "blocks" for all of its blocks.

    Raises:
        ValueError: for targets that match no linear layer; for DoRA on experts that are named.
    """
    for name, own in (settings or {}).items():
        part = getattr(model, name, None)
        if not own or part is None:
            continue
        targets = _targets(name, part, own["targets"], own["method"])
        trained = {parameter for parameter in part.parameters() if parameter.requires_grad}
        stacked = [target for target in targets if target in expert_weights(part)]
        _adapt_experts(name, part, stacked, own)
        targets = [target for target in targets if target not in stacked]
        library = peft_library()
        config = library.LoraConfig(
            r=own["rank"],
            lora_alpha=own["alpha"],
            lora_dropout=own["dropout"],
            use_dora=own["method"] == "dora",
            # exact names: a list would match their ends elsewhere too
            target_modules="|".join(map(re.escape, targets)),
        )
        hooked = any(part.get_submodule(target)._forward_hooks for target in targets)
        if own["method"] == "dora" and hooked:
            other = "Partial LoRA, whose updates it would scale"
            raise ValueError(f"peft.{name}.method=dora cannot be combined with {other}; choose lora")
        if targets:
            library.inject_adapter_in_model(config, _layers_of(part))
        for inner, parameter in part.named_parameters():
            # who trains is said by the stage
            parameter.requires_grad_(parameter in trained or parameter.requires_grad)
            if is_update(inner) and parameter.dtype in (torch.bfloat16, torch.float16):
                # steps smaller than a short number's last digit would be lost
                parameter.data = parameter.data.float()
        part.register_state_dict_post_hook(_plain_names)
        part.register_load_state_dict_pre_hook(_wrapped_names)


def _layers_of(part: nn.Module) -> nn.Module:
    """The layers of a part, which are replaced in it. PEFT asks a model eight times a layer for its `config`, which a
    part makes each time: half of the time that adapters on 7B take."""
    layers = nn.Module()
    layers._modules = part._modules
    return layers


def peft_library() -> Any:
    """PEFT, imported where there is something to adapt: that takes seconds."""
    return import_module("peft")


def _adapt_experts(name: str, part: nn.Module, targets: list[str], own: Settings) -> None:
    for inner, experts in list(experts_of(part)):
        kinds = [target.rpartition(".")[2] for target in targets if target.rpartition(".")[0] == inner]
        if kinds:
            open_experts(experts)
        for kind in kinds:
            try:
                getattr(experts, kind).adapt(own["rank"], own["alpha"], own["dropout"])
            except ValueError as error:
                raise ValueError(f"peft.{name}: {error}") from error


def _targets(name: str, part: nn.Module, patterns: str | Iterable[str], method: str) -> list[str]:
    stacked = list(expert_weights(part))
    linear = [n for n, module in part.named_modules() if isinstance(module, nn.Linear)] + stacked
    if patterns == BLOCKS:
        inside = {id(module) for block in part.sharding_units() for module in block.modules()}
        # experts stand in blocks; there is no DoRA of theirs, which leaves them
        plain = [n for n in linear if n not in stacked]
        found = [n for n in plain if id(part.get_submodule(n)) in inside] or plain
        found += stacked if method == "lora" else []
    else:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if idle := [p for p in patterns if not any(fnmatchcase(n, p) for n in linear)]:
            raise ValueError(
                f"peft.{name}.targets: {', '.join(map(repr, idle))} matches no linear layer; "
                f"valid choices: {BLOCKS}, {', '.join(_kinds(linear)) or 'none, this part has no linear layer'}"
            )
        found = [n for n in linear if any(fnmatchcase(n, p) for p in patterns)]
        if method == "dora" and (named := [n for n in found if n in stacked]):
            fault = f"{_kinds(named)[0]} are experts, which have no DoRA"
            raise ValueError(f"peft.{name}.method=dora: {fault}; choose lora, or targets without them")
    if not found:
        fault = f"{type(part).__name__} has no linear layers"
        raise ValueError(f"peft.{name}: {fault}; use peft.{name}=null and train it as it is")
    return found


def _kinds(names: Iterable[str]) -> list[str]:
    """Names with a star for every number."""
    return sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names})


def _plain_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    for name in [n for n in state if n.startswith(prefix) and WRAPPED in n]:
        state[plain_name(name)] = state.pop(name)


def _wrapped_names(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for name, layer in module.named_modules():
        if _is_adapted(layer):
            start = f"{prefix}{name}."
            for key in [k for k in state if k.startswith(start) and not is_update(k)]:
                state[f"{start}base_layer.{key[len(start) :]}"] = state.pop(key)


def is_update(name: str) -> bool:
    """Whether a tensor's name is that of an adapter."""
    return any(f".{kind}." in name for kind in UPDATES)


def adapted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that carry an adapter, by name."""
    return [(name, module) for name, module in model.named_modules() if _is_adapted(module)]


def _is_adapted(layer: nn.Module) -> bool:
    return bool(getattr(layer, "lora_A", None)) and hasattr(layer, "get_base_layer")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, layers do what their plain weights do. PEFT's own switch would also let adapters train
    that are frozen."""
    layers: list[Any] = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def are_fresh(model: nn.Module) -> bool:
    """Whether there are adapters and all of them change nothing yet."""
    updates = [update.weight for _, layer in adapted_layers(model) for update in layer.lora_B.values()]
    return bool(updates) and not any(bool(update.detach().any()) for update in updates)


def start_magnitudes(model: nn.Module, names: Iterable[str]) -> None:
    """Let DoRA's magnitudes of these names be those of the weights, which have been loaded since
    the adapters were made."""
    fresh = set(names)
    for name, layer in adapted_layers(model):
        if NAME in layer.lora_magnitude_vector and f"{name}.lora_magnitude_vector.{NAME}.weight" in fresh:
            weight, update = dequantized_weight(layer.get_base_layer()), layer.lora_magnitude_vector[NAME].weight
            with torch.no_grad():
                whole = _sum(weight, _updates(layer), layer.scaling[NAME])
                update.copy_(torch.linalg.vector_norm(whole, dim=1).to(update.dtype))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every update to its weight and leave plain layers, which every layout can hold."""
    for name, layer in adapted_layers(model):
        base = layer.get_base_layer()
        weight = merged_weight(dequantized_weight(base), _updates(layer), layer.scaling[NAME])
        if isinstance(layer, ExpertLinear):
            layer.replace(weight)
        else:
            model.set_submodule(name, plain_linear(base, weight))
    close_experts(model)


def _updates(layer: nn.Module) -> dict[str, Tensor]:
    kinds = [kind for kind in UPDATES if NAME in getattr(layer, kind, {})]
    return {kind: getattr(layer, kind)[NAME].weight for kind in kinds}


def _sum(weight: Tensor, updates: Mapping[str, Tensor], scale: float) -> Tensor:
    """Weight and update in the type of the weight, before any magnitude: (O, I), of experts (E, ...)."""
    a, b = updates["lora_A"], updates["lora_B"]
    return weight + (scale * (b @ a if a.ndim == 2 else update_of(a, b))).to(weight.dtype)


def merged_weight(weight: Tensor, updates: Mapping[str, Tensor], scale: float) -> Tensor:
    """The weight (O, I), of experts (E, ...), of weight and update together; works on the meta device
    too."""
    updates = {kind: tensor.float() for kind, tensor in updates.items()}
    whole = _sum(weight.float(), updates, scale)
    if "lora_magnitude_vector" in updates:
        norms = torch.linalg.vector_norm(whole, dim=1)
        whole *= (updates["lora_magnitude_vector"] / norms)[:, None]
    return whole.to(weight.dtype)


def merged_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Settings | None]) -> dict[str, Tensor]:
    """Tensors by name with the updates of the parts in `settings` added to their weights."""
    found = dict(tensors)
    for name in [n for n in tensors if ".lora_A." in n]:
        part, owner = name.split(".", 1)[0], name.partition(".lora_A.")[0]
        own = settings.get(part)
        if not own:
            continue
        keys = {kind: f"{owner}.{kind}.{NAME}.weight" for kind in UPDATES}
        updates = {kind: found.pop(key) for kind, key in keys.items() if key in found}
        key = f"{owner}.weight" if f"{owner}.weight" in found else owner
        found[key] = merged_weight(found[key], updates, own["alpha"] / own["rank"])
    return found


def differing(there: Mapping[str, Settings | None] | None, here: Mapping[str, Settings | None] | None) -> dict[str, Settings]:
    """The adapters of a source that a model does not go on with: those of parts that it adapts
    otherwise or not at all."""
    same = ("method", "rank", "alpha", "targets")
    return {
        part: own
        for part, own in (there or {}).items()
        if own and any(((here or {}).get(part) or {}).get(key) != own[key] for key in same)
    }
