"""What the losses need to know of other processes. With one process every function is the identity.

With tensor parallelism the processes of a group read the same samples and count as one; only those
that read others are seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_alone = False
_group: dist.ProcessGroup | None = None  # those that read other samples; None: all


@contextmanager
def single_process() -> Iterator[None]:
    """As the only process: for work on tensors without values, which cannot be sent."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def set_data_parallel_group(group: dist.ProcessGroup | None) -> None:
    """From now on the other processes are those of this group; None: all."""
    global _group
    _group = group


def data_parallel_group() -> dist.ProcessGroup | None:
    """The group of the processes that are seen; None: all."""
    return _group


def data_parallel_rank_and_size(trainer: Any) -> tuple[int, int]:
    """Which share of the samples this process reads, and how many shares there are."""
    size = getattr(getattr(trainer, "strategy", None), "tensor_parallel_size", 1)
    return trainer.global_rank // size, trainer.world_size // size


def _runs() -> bool:
    return dist.is_available() and dist.is_initialized() and not _alone


def world_size() -> int:
    """Processes that train together, each on samples of its own."""
    return dist.get_world_size(_group) if _runs() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank(_group) if _runs() else 0


def gather_with_grad(x_BE: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (B, E) -> (W * B, E).

    The backward pass sums over ranks, so that after the usual averaging of gradients the result is
    exact for any number of processes.
    """
    return x_BE if world_size() == 1 else _Gather.apply(x_BE)


def gather(x_B: Tensor) -> Tensor:
    """The same without gradient, for small things such as ids: (B, ...) -> (W * B, ...)."""
    return x_B if world_size() == 1 else _gathered(x_B)


def _gathered(x: Tensor) -> Tensor:
    gathered = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather(list(gathered.chunk(world_size())), x.contiguous(), group=_group)
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather forward; backward, every rank sums what all found for its rows."""

    @staticmethod
    def forward(ctx: Any, x_BE: Tensor) -> Tensor:
        return _gathered(x_BE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # autograd may still need the one it was given
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=_group)
        return grad.chunk(world_size())[rank()]


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """A sum over local items as this rank's share of the mean over the items of all ranks.

    Gradients are averaged over ranks afterwards, hence the factor W: the mean over ranks of (W *
    local sum / global count) is the global mean.
    """
    if world_size() > 1:
        count = count.clone()
        dist.all_reduce(count, group=_group)
    return total * world_size() / count.clamp(min=1)


def all_reduce_max(number: int) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return number
    device = "cuda" if dist.get_backend(_group) == "nccl" else "cpu"
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_group)
    return int(found)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, a new tensor; without gradient."""
    if world_size() == 1:
        return tensor
    tensor = tensor.cuda() if dist.get_backend(_group) == "nccl" else tensor.clone()
    dist.all_reduce(tensor, group=_group)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """A plain Python value of each process, by their number."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value, group=_group)
    return found


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor without its graph; a divided one is gathered by all processes together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
