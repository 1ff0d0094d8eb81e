"""Optimizer and schedule builders, completed by the stage with its parameters and length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_internvl.layers.peft import plain_name
from lightning_internvl.layers.tables import tables, word_tables
from lightning_internvl.protocols import HasShardingUnits
from lightning_internvl.stages.freezing import FreezePlan, check_matches, matches
from lightning_internvl.stages.roles import has_role, model_roles, names_of

# What stands before the first block of a part: tables of tokens and positions, the patch layer,
# queries.
BOTTOM = ("*embed*", "*query_tokens", "*latents", "*frame_embs", "*class_token", "*cls_token", "*pre_layrnorm*", "*logit_scale")


def parameter_groups(
    model: nn.Module,
    plan: FreezePlan,
    lr: float,
    weight_decay: float,
    part_lr: Mapping[str, float] | None = None,
    layer_decay: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Every parameter that the stage ever trains, grouped by learning rate and decay.

    Vectors (biases, norms, scales), tables and queries do not decay (see
    `lightning_internvl.layers.tables`).

    Args:
        part_lr: learning rates of their own, by name pattern or role (see
            `lightning_internvl.stages.roles`); the first match wins, all others use `lr`.
        layer_decay: by part, the factor on the learning rate from each layer to the one below it
            (see `layer_scales`).

    Raises:
        ValueError: for a pattern that matches no parameter, which is most often a typing error, or
            a rate that is none.
    """
    names = [plain_name(name) for name, _ in model.named_parameters()]
    rates, roles, setting = dict(part_lr or {}), model_roles(model), "optimizer.part_lr"
    for pattern in [pattern for pattern in rates if not has_role(pattern)]:
        check_matches(pattern, names, setting)
    # A name that has a rate of its own as it is written does not take that of its role.
    named = {p: [n for n in names_of(p, roles, setting) if n == p or n not in rates] for p in rates}
    scales, never = layer_scales(model, layer_decay or {}), tables(model)
    groups: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not plan.ever_trains(name):
            continue
        pattern = next((p for p, own in named.items() if any(matches(plain_name(name), n) for n in own)), "")
        layer, scale = scales.get(name, ("", 1.0))
        decays = id(parameter) not in never
        group = groups.setdefault(
            (pattern, layer, decays),
            {
                "params": [],
                "name": f"{', '.join(filter(None, (pattern, layer))) or 'rest'}{'' if decays else ' (no decay)'}",
                "lr": (rates[pattern] if pattern else lr) * scale,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_scales(model: nn.Module, layer_decay: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """Layer-wise decay of the learning rate: for each parameter below the top its layer and the
    factor on its rate.

    Of the L blocks of a part (its `sharding_units`), block i has rate^(L - i), and what stands
    before block 0 has rate^(L + 1). What stands after the blocks, and parts without a rate, keep
    the full one. The logit scale goes with the middleware.
    Source: official `internvl_g/internvl/train/trainer_monkey_patch.py` (layer ids 0 to L + 1).

    Raises:
        ValueError: for a part that the model lacks, or a rate outside (0, 1].
    """
    found: dict[str, tuple[str, float]] = {}
    words = word_tables(model)
    for part, rate in layer_decay.items():
        module = getattr(model, part, None)
        if not isinstance(module, HasShardingUnits):
            able = [name for name, child in model.named_children() if isinstance(child, HasShardingUnits)]
            fault = f"{part!r} is no part with layers here"
            raise ValueError(f"optimizer.layer_decay: {fault}; valid choices: {', '.join(able)}")
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"optimizer.layer_decay.{part}={rate!r} must lie above 0 and at most at 1")
        blocks = module.sharding_units()
        layer_of = {id(p): i for i, block in enumerate(blocks) for p in block.parameters()}
        for name, parameter in model.named_parameters():
            below = name.startswith(f"{part}.") or (part == "middleware" and name.startswith("objectives."))
            layer = layer_of.get(id(parameter))
            if layer is not None:
                found[name] = f"{part} layer {layer}", rate ** (len(blocks) - layer)
            elif below and (id(parameter) in words or any(matches(name, pattern) for pattern in BOTTOM)):
                found[name] = f"{part} below layer 0", rate ** (len(blocks) + 1)
    return found


def adamw(
    model: nn.Module,
    plan: FreezePlan,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    part_lr: Mapping[str, float] | None = None,
    layer_decay: Mapping[str, float] | None = None,
    fused: bool = True,
) -> Optimizer:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(model, plan, lr, weight_decay, part_lr, layer_decay)
    return _clipped(torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused))


def adamw_8bit(
    model: nn.Module,
    plan: FreezePlan,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    part_lr: Mapping[str, float] | None = None,
    layer_decay: Mapping[str, float] | None = None,
    paged: bool = False,
    min_8bit_size: int = 4096,
) -> Optimizer:
    """AdamW over `parameter_groups` with moments of 8 bits (Dettmers et al. 2022).

    Args:
        paged: let moments move to the memory of the host while a GPU is full; on a CPU it changes
            nothing.
        min_8bit_size: smaller tensors keep their moments in float32.
    """
    import bitsandbytes as bnb

    groups = parameter_groups(model, plan, lr, weight_decay, part_lr, layer_decay)
    paged = paged and torch.cuda.is_available()
    settings = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps, "min_8bit_size": min_8bit_size, "is_paged": paged}
    with torch.device("cpu"):  # where its tables are computed, whatever the model lies on
        return bnb.optim.AdamW8bit(groups, **settings)


def sgd(
    model: nn.Module,
    plan: FreezePlan,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    part_lr: Mapping[str, float] | None = None,
    layer_decay: Mapping[str, float] | None = None,
    fused: bool = True,
) -> Optimizer:
    """SGD with momentum over `parameter_groups`, as the published probes train."""
    groups = parameter_groups(model, plan, lr, weight_decay, part_lr, layer_decay)
    return _clipped(torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused))


def _clipped(optimizer: Optimizer) -> Optimizer:
    """A fused optimizer that takes gradients unscaled; from one that would unscale them itself,
    Lightning refuses to clip their norm in mixed precision, even in bf16, where nothing is
    scaled."""
    setattr(optimizer, "_step_supports_amp_scaling", False)  # noqa: B010 an attribute of fused optimizers alone
    return optimizer


def cosine(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Linear warm-up to each group's rate, then half a cosine to `min_ratio` of it."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
