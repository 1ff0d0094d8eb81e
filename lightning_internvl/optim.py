"""Optimizer and schedule builders, completed by the stage with its parameters and length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_internvl.freezing import FreezePlan, check_matches, matches

# Tables, scales and tokens are no matrices that multiply activations; decaying them only pulls them to zero.
NO_DECAY = ("*query_tokens", "*class_embedding", "*position_embedding", "*logit_scale", "*embed_tokens*")


def parameter_groups(
    model: nn.Module, plan: FreezePlan, *, lr: float, weight_decay: float, part_lr: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Every parameter that the stage will ever train, grouped by learning rate and by whether it decays.

    Vectors (biases, norms, scales) and the names in `NO_DECAY` do not decay.

    Args:
        part_lr: learning rates of their own, by name pattern; the first match wins, all others use `lr`.

    Raises:
        ValueError: for a pattern that matches no parameter, which is most often a typing error.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in part_lr or {}:
        check_matches(pattern, names, "optimizer.part_lr")
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not plan.ever_trains(name):
            continue
        pattern = next((p for p in part_lr or {} if matches(name, p)), "")
        decays = parameter.ndim > 1 and not any(matches(name, p) for p in NO_DECAY)
        group = groups.setdefault(
            (pattern, decays),
            {
                "params": [],
                "name": f"{pattern or 'rest'}{'' if decays else ' (no decay)'}",
                "lr": part_lr[pattern] if pattern else lr,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def adamw(
    model: nn.Module,
    plan: FreezePlan,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    part_lr: Mapping[str, float] | None = None,
    fused: bool = True,
) -> Optimizer:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(model, plan, lr=lr, weight_decay=weight_decay, part_lr=part_lr)
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=fused)


def cosine(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Linear warm-up to each group's rate, then a half cosine down to `min_ratio` of it at `total_steps`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
