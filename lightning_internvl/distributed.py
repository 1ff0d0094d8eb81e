"""What the losses need to know of other processes. With one process every function is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_with_grad(x_BE: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (B, E) -> (W * B, E).

    The backward pass sums over ranks, so that after the usual averaging of gradients the result is exact for any number of processes.
    """
    if world_size() == 1:
        return x_BE
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x_BE.contiguous()))


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """A sum over local items as this rank's share of the mean over the items of all ranks.

    Gradients are averaged over ranks afterwards, hence the factor W: mean over ranks (W * local sum / global count) is the global mean.
    """
    if world_size() > 1:
        count = count.clone()
        dist.all_reduce(count)
    return total * world_size() / count.clamp(min=1)
