"""The norm of all gradients, however they are divided, and clipping by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that a step will use; weights that were not used have none."""
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in trained if parameter.grad is not None]


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients as one vector, a scalar: of those that are divided the whole ones
    count, so that all processes must call it. Not finite if any gradient is not."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:  # PyTorch's own cannot add up what is divided in different ways
        by_mesh.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = [get_total_norm(own) for own in by_mesh.values()] or [torch.zeros(())]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip(grads: Sequence[Tensor], limit: float, total: Tensor) -> None:
    """`torch.nn.utils.clip_grad_norm_` with the norm that is known, in place."""
    if grads:
        scale_gradients(grads, (limit / (total + 1e-6)).clamp(max=1.0))


def scale_gradients(grads: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply all by a number, in place."""
    torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], scale)


def clips_in_step(optimizer: Optimizer, grads: Sequence[Tensor]) -> bool:
    """Whether a step of the optimizer can clip: a fused one on a GPU divides gradients by a number
    that lies there, which saves a pass over all of them. On a CPU, where nothing is gained, and
    where gradients are divided among processes they are clipped before."""
    fused = bool(optimizer.defaults.get("fused"))
    return fused and bool(grads) and all(grad.is_cuda and not isinstance(grad, DTensor) for grad in grads)


def clip_in_step(optimizer: Optimizer, limit: float, total: Tensor) -> None:
    """Let the next step of a fused optimizer clip by the norm that is known (see `clip`)."""
    optimizer.grad_scale = ((total + 1e-6) / limit).clamp(min=1.0).float()  # type: ignore[attr-defined]  # fused ones read it
