"""Weights that the first process alone has loaded, sent block by block as they divide.

The others build the model on the meta device, where it takes no memory: of all processes one holds
it whole, each other one no more than its shares and the block that is on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_internvl.launch import is_helper


def starts_empty(strategy: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> bool:
    """Whether this process builds a stage without weights, because the first one will send them.
    Quantised parts stay whole, and can be quantised only where their weights are."""
    return is_helper() and str(strategy.get("_target_")).endswith(".FSDP2") and not quantization


class Spread:
    """Fills modules with the first process's tensors, unless every process has its own.

    All processes make one and call `fill` in the same order.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        empty = [any(p.is_meta for p in model.parameters())] * dist.get_world_size()
        dist.all_gather_object(empty, empty[0])
        self.needed = any(empty)
        self.there: list[Tensor] = []  # buffers that were filled
        if self.needed:
            self._agree(model)

    def _agree(self, model: nn.Module) -> None:
        """Take over from the first process what a checkpoint says of types and generation."""
        own = dict(_tensors(model))
        lm = getattr(model.decoder, "lm", None)
        dtypes = {name: tensor.dtype for name, tensor in own.items()}
        message: list[Any] = [dtypes, getattr(lm, "generation_config", None)]
        dist.broadcast_object_list(message)
        dtypes, generation_config = message
        if own.keys() != dtypes.keys():
            different = sorted(own.keys() ^ dtypes.keys())[:8]
            raise RuntimeError(f"processes have built different models: {different}")
        self.dtypes = {id(own[name]): dtype for name, dtype in dtypes.items()}
        if lm is not None and generation_config is not None:
            lm.generation_config = generation_config

    def fill(self, module: nn.Module) -> None:
        """Tensors of a module that are not divided yet get the values that the first process has;
        those that are one stay one."""
        made: dict[Tensor, Tensor] = {}
        for inner in module.modules() if self.needed else ():
            stores: tuple[dict[str, Any], ...] = (inner._parameters, inner._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is None or isinstance(tensor, DTensor) or any(tensor is one for one in self.there):
                        continue
                    if tensor not in made:
                        made[tensor] = self._sent(tensor)
                    store[name] = made[tensor]
        self.there += [tensor for tensor in made.values() if not isinstance(tensor, nn.Parameter)]

    def _sent(self, tensor: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            value = tensor.detach().to(self.device).contiguous()
        else:
            value = torch.empty(tensor.shape, dtype=self.dtypes[id(tensor)], device=self.device)
        if value.numel():
            dist.broadcast(value.flatten().view(torch.uint8), 0)  # bytes: every backend sends them
        trains = isinstance(tensor, nn.Parameter)
        return nn.Parameter(value, tensor.requires_grad) if trains else value


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
