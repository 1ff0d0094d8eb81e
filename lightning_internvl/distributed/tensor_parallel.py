"""Linear layers of a block divided among the processes of a group that read the same samples
(Shoeybi et al. 2019, Megatron-LM).

A part says with `tensor_plan()` which of its layers are divided by their outputs (columns) and
which by their inputs (rows). What lies between them must work on each share alone, without weights
of its own; so must attention, on a share of the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from lightning_internvl.protocols import HasTensorPlan, TensorPlan


def plan_of(part: nn.Module | None) -> TensorPlan | None:
    """The plan of a part, None where its layers are not divided."""
    return part.tensor_plan() if isinstance(part, HasTensorPlan) else None


def styles_of(model: nn.Module) -> dict[nn.Module, ParallelStyle]:
    """How each layer of a model is divided, for those that are."""
    styles = [_styles(part, plan_of(part)) for part in model.children()]
    return {layer: style for own in styles for layer, style in own.items()}


def _styles(part: nn.Module, plan: TensorPlan | None) -> dict[nn.Module, ParallelStyle]:
    ways = {} if plan is None else {ColwiseParallel: plan.columns, RowwiseParallel: plan.rows}
    return {
        layer: way()
        for name, layer in part.named_modules()
        for way, patterns in ways.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def check_layers(model: nn.Module, size: int, changed: Mapping[str, Mapping[str, Any]], compiled: Mapping[str, Any]) -> None:
    """Refuse a number of shares that the parts of a stage cannot be divided into.

    Args:
        changed: parts whose layers are others, by the setting that says so: `peft` and
            `quantization`.
        compiled: what `compile` says by part.

    Raises:
        ValueError: naming the part, the reason and what is valid.
    """
    parts = {name: part for name, part in model.named_children() if name != "objectives"}
    plans = {name: plan for name, part in parts.items() if (plan := plan_of(part))}
    setting = f"strategy.tensor_parallel_size={size}"
    if not plans:
        kinds = ", ".join(f"{name}: {type(part).__name__}" for name, part in parts.items())
        raise ValueError(
            f"{setting}: no part of this stage can divide its layers ({kinds}); set it to 1, or take parts that can: InternViT, "
            "the towers of CLIP and SigLIP, language models whose layers are those of LLaMA (llama, qwen2, mistral, gemma2)"
        )
    for name, plan in plans.items():
        if wrong := {what: count for what, count in plan.counts.items() if count % size}:
            counts = plan.counts.values()
            fitting = [n for n in range(1, min(counts) + 1) if not any(c % n for c in counts)]
            told = ", ".join(f"{what}={count}" for what, count in wrong.items())
            valid = ", ".join(map(str, fitting))
            choices = f"valid choices with this {name}: {valid}"
            raise ValueError(f"{setting} does not divide the {name}'s {told}; {choices}")
        for kind, parts_changed in changed.items():
            if parts_changed.get(name):
                held = f"{kind}.{name} holds layers that cannot be divided"
                raise ValueError(f"{setting}: {held}; set it to null, or the size to 1")
        if compiled.get(name):
            fault = f"compile.{name} has not been shown to work with divided layers"
            raise ValueError(f"{setting}: {fault}; set one of them back")
