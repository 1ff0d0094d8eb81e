"""Equal blocks are counted once: a block that was seen with the same inputs is replayed in one step
instead of run again.

This makes a plan of 48 layers as fast as one of a single layer. The blocks are the sharding units
that parts name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_internvl.model.vlm import VLM
from lightning_internvl.plan.kernels import Kernels
from lightning_internvl.plan.meter import COPIES, Meter, parts_of
from lightning_internvl.protocols import HasShardingUnits
from lightning_internvl.training.activation_checkpointing import has_backward, kept_operations

PLACE = ("layer_idx", "layer_id", "layer_index")  # numbers that only say which block it is


@dataclass
class Record:
    """What one block did: FLOPs, bytes kept of its own and as copies of weights, which inputs and
    outputs were kept, and outputs (templates on the meta device, other values as they are)."""

    forward: int
    backward: int  # 0 where only forward passes were asked for
    kept: int
    copies: int
    inputs: list[int]
    kept_outputs: list[int]
    outputs: list[Any]
    spec: Any
    again: int = 0  # bytes that are there while the block is computed again


class Units:
    """Replaces the forward of all sharding units by a replay of the first equal one.

    Args:
        recompute: parts whose blocks are computed again, full or selective (see
            `lightning_internvl.training.activation_checkpointing`).

    Attributes:
        kernels: those in force.
        backward: whether backward passes are counted.
        kinds: what is known of each unit, by its identity; to be emptied when the stage changes
            what trains.
    """

    def __init__(self, model: VLM, meter: Meter, recompute: Mapping[str, str | None]) -> None:
        self.meter, self.kernels, self.backward = meter, Kernels(), True
        self.records: dict[Any, Record] = {}
        self.kinds: dict[int, tuple[Any, list[nn.Parameter]]] = {}
        self.recompute: dict[int, str | None] = {}
        for name, part in parts_of(model).items():
            for unit in part.sharding_units() if isinstance(part, HasShardingUnits) else []:
                self.recompute[id(unit)] = recompute.get(name) or None
                unit.forward = self._replayed(unit, unit.forward)

    def _replayed(self, unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replayed(*args: Any, **kwargs: Any) -> Any:
            flat, spec = tree_flatten((args, kwargs))
            # or every look at a shape would go through the modes in force
            with torch._C.DisableTorchFunction():
                key = self._key(unit, flat, spec)
            if key not in self.records:
                self.records[key] = self._measured(unit, forward, flat, spec)
            with torch._C.DisableTorchFunction():
                return self._replay(unit, self.records[key], [x for x in flat if isinstance(x, Tensor)])

        return replayed

    def _key(self, unit: nn.Module, flat: list[Any], spec: Any) -> Any:
        if id(unit) not in self.kinds:
            self.kinds[id(unit)] = _kind(unit), [p for p in unit.parameters() if p.requires_grad]
        state = self.kernels.autocast, self.backward, torch.is_grad_enabled(), self.recompute[id(unit)]
        return self.kinds[id(unit)][0], state, str(spec), tuple(map(_described, flat))

    def _measured(self, unit: nn.Module, forward: Callable[..., Any], flat: list[Any], spec: Any) -> Record:
        own = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in flat]
        tensors = [x for x in own if isinstance(x, Tensor)]
        again = self.recompute[id(unit)] if has_backward(unit, own) else None
        results, attended = _Results(), self.kernels.attended
        with self.meter.scope() as tally:
            args, kwargs = tree_unflatten(own, spec)
            with results if again == "selective" else nullcontext():
                outputs, out_spec = tree_flatten(forward(*args, **kwargs))
            kept = {key: held.size for key, held in tally.kept.items()}
            ends = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
            starts = [x for x in [*tensors, *unit.parameters()] if x.requires_grad]
            if self.backward and ends and starts:
                grads = [torch.empty_like(x) for x in ends]
                self.meter.backward(lambda: torch.autograd.grad(ends, starts, grads, allow_unused=True))
        copied = self.kernels.copied
        places = {_storage(x): i for i, x in reversed(list(enumerate(tensors)))}
        ends_at = {_storage(x): i for i, x in enumerate(outputs) if isinstance(x, Tensor) and _storage(x) not in places}
        record = Record(
            forward=tally.forward.total(),
            backward=tally.backward.total(),
            kept=sum(size for key, size in kept.items() if key not in places and key not in ends_at and key not in copied),
            copies=sum(size for key, size in kept.items() if key in copied),
            inputs=[i for key, i in places.items() if key in kept],
            kept_outputs=[i for key, i in ends_at.items() if key in kept],
            outputs=[x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in outputs],
            spec=out_spec,
        )
        if again is None:
            return record
        results.bytes += self.kernels.attended - attended if again == "selective" else 0
        read = list(places.values())
        return replace(record, kept=results.bytes, again=record.kept, inputs=read, kept_outputs=[])

    def _replay(self, unit: nn.Module, record: Record, tensors: list[Tensor]) -> Any:
        meter, part = self.meter, self.meter.part
        meter.tally.forward[part] += record.forward
        meter.tally.keep(object(), record.kept, part)
        meter.tally.keep(("again", part), record.again, part)  # one block at a time
        meter.tally.keep((id(unit), "copies"), record.copies, part, COPIES)
        made = _Replay.apply(meter, part, record, len(tensors), *tensors, *self.kinds[id(unit)][1])
        found = iter(made)
        return tree_unflatten([next(found) if isinstance(x, Tensor) else x for x in record.outputs], record.spec)


class _Results(TorchDispatchMode):
    """Counts the bytes of what selective checkpointing keeps, but for attention, which has a kernel
    of its own here."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **kwargs or {})
        self.bytes += result.nbytes if func in kept_operations() and isinstance(result, Tensor) else 0
        return result


class _Replay(torch.autograd.Function):
    """Outputs of the right shapes, connected with the inputs and weights; FLOPs of the backward
    pass are added when it comes."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, part: str, record: Record, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.meter, ctx.part, ctx.record = meter, part, record
        ctx.inputs = [(x.shape, x.dtype) for x in tensors[:count]]
        made = [_like(x) if isinstance(x, Tensor) else None for x in record.outputs]
        ctx.save_for_backward(*(tensors[i] for i in record.inputs), *(made[i] for i in record.kept_outputs))
        fixed = [new for new, x in zip(made, record.outputs, strict=True) if new is not None and not x.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return tuple(x for x in made if x is not None)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        ctx.meter.tally.backward[ctx.part] += ctx.record.backward
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, (shape, dtype) in enumerate(ctx.inputs, start=4):
            if ctx.needs_input_grad[place]:
                grads[place] = torch.empty(shape, dtype=dtype, device="meta")
        return tuple(grads)


def _like(x: Tensor) -> Tensor:
    """A new tensor of the same shape and strides (`empty_like` is slow on the meta device)."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, int | str | None) else str(type(value))
    return tuple(value.shape), value.stride(), value.dtype, value.requires_grad


def _kind(unit: nn.Module) -> Any:
    """Equal for blocks that do the same: classes, weights, what trains, and settings, of fractions
    only whether they are 0."""
    weights = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in unit.named_parameters())
    modules = []
    for module in unit.modules():
        own = {k: v for k, v in vars(module).items() if k not in PLACE}
        settings = {k: v for k, v in own.items() if isinstance(v, bool | int | float | str)}
        values = ((k, bool(v) if isinstance(v, float) else v) for k, v in settings.items())
        modules.append((type(module), *sorted(values)))
    return weights, tuple(modules)
