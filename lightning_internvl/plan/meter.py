"""Counts the FLOPs of a forward and a backward pass and the bytes kept between, by part."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_internvl.model.vlm import VLM

OTHER = "other"  # outside all parts
# kept by layers, by the losses, and weights in a lower type
ACTIVATIONS, LOGITS, COPIES = "activations", "logits", "copies"


class Held(NamedTuple):
    """Something that autograd keeps; the object itself, so that nothing else gets its identity."""

    what: Any
    size: int
    part: str
    kind: str


@dataclass
class Tally:
    """What was counted. FLOPs: a multiply-add counts as two. `kept` is by storage; `rows` are bytes
    in it of what losses judge, by part, and `judged` their numbers by loss."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    kept: dict[Any, Held] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)

    def keep(self, what: Any, size: int, part: str, kind: str = ACTIVATIONS) -> None:
        """Count bytes that are kept, once for each `what`."""
        self.kept.setdefault(what, Held(what, size, part, kind))

    def kept_bytes(self, kind: str) -> Counter[str]:
        """Bytes of one kind by part."""
        found: Counter[str] = Counter()
        for held in self.kept.values():
            found[held.part] += held.size if held.kind == kind else 0
        return found


_SINGLE = {torch.ops.prim.device.default}  # operations that are found to be no composites


class Meter(TorchDispatchMode):
    """Counts while it is entered; `watch` tells it whose work it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()
        self.weights: set[int] = set()  # storages that are there anyway
        # the parts that are at work in the forward pass, outermost first
        self.inside: list[str] = []
        self.behind: str | None = None  # the part whose backward pass runs
        self.width: int | None = None  # of the rows that the last loss judges
        # whether a storage holds a weight in a lower type
        self.is_copy: Callable[[int], bool] = lambda storage: False

    @property
    def part(self) -> str:
        """The part at work."""
        return self.inside[-1] if self.inside else OTHER

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func not in _SINGLE:
            with self:  # perhaps a composite of operations that are counted
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            _SINGLE.add(func)
        result = func(*args, **kwargs)
        if formula is not None:
            where = self.tally.forward if self.behind is None else self.tally.backward
            where[self.behind or self.part] += formula(*args, **kwargs, out_val=result)
        return result

    def pack(self, tensor: Tensor) -> tuple[Tensor, str]:
        """Called by autograd for what it keeps (`saved_tensors_hooks`)."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            kind = LOGITS if any(part.startswith("objectives") for part in self.inside) else ACTIVATIONS
            kind = COPIES if self.is_copy(storage._cdata) else kind
            if kind == LOGITS and tensor.shape[-1:] == (self.width,) and storage._cdata not in self.tally.kept:
                self.tally.rows[self.part] += storage.nbytes()
            self.tally.kept.setdefault(storage._cdata, Held(storage, storage.nbytes(), self.part, kind))
        return tensor, self.part

    def unpack(self, packed: tuple[Tensor, str]) -> Tensor:
        """Called by autograd right before the backward pass of what was kept."""
        tensor, part = packed
        if self.behind is not None:
            self.behind = part
        return tensor

    @contextmanager
    def scope(self) -> Iterator[Tally]:
        """Count apart what happens inside."""
        outer, self.tally = self.tally, Tally()
        behind, self.behind = self.behind, None
        try:
            yield self.tally
        finally:
            self.tally, self.behind = outer, behind

    def backward(self, run: Callable[[], Any]) -> Any:
        """Run a backward pass."""
        self.behind = OTHER
        try:
            return run()
        finally:
            self.behind = None


def parts_of(model: VLM) -> dict[str, nn.Module]:
    """The parts by name, each objective for itself."""
    parts = {name: module for name, module in model.named_children() if name != "objectives"}
    return parts | {f"objectives.{name}": module for name, module in model.objectives.items()}


def watch(meter: Meter, model: VLM) -> None:
    """Let the meter know which part works: through the methods of the parts, and through all
    modules inside them."""
    for name, part in parts_of(model).items():
        for module in part.modules():
            entered: list[int] = []
            module.register_forward_pre_hook(functools.partial(_enter, meter, name, entered))
            module.register_forward_hook(functools.partial(_leave, meter, entered), always_call=True)
        for method, function in inspect.getmembers(type(part), inspect.isfunction):
            ours = not method.startswith("_") and not function.__module__.startswith("torch.") and method != "forward"
            if ours:
                setattr(part, method, _watched(meter, name, getattr(part, method)))


def _enter(meter: Meter, name: str, entered: list[int], *_: Any) -> None:
    entered.append(len(meter.inside))
    meter.inside.append(name)


def _leave(meter: Meter, entered: list[int], *_: Any) -> None:
    # a module whose inputs another hook refuses is left without having been entered
    if entered:
        del meter.inside[entered.pop() :]


def _watched(meter: Meter, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        outside = len(meter.inside)
        meter.inside.append(name)
        try:
            return method(*args, **kwargs)
        finally:
            del meter.inside[outside:]

    return watched
