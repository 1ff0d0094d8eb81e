"""The operators of a training step as a GPU would run them, noted on tensors without values: FLOPs and bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.roofline_fusion import PRODUCTS, Op, attends
from lightning_internvl.layers import attention_masks, attention_trial
from lightning_internvl.objectives import next_token
from lightning_internvl.plan import kernels
from lightning_internvl.training import activation_checkpointing

IS_META, IS_CUDA = Tensor.is_meta.__get__, Tensor.is_cuda.__get__  # of which tensors are told by `Gpu` what autograd is told
META, CUDA = torch.device("meta"), torch.device("cuda", 0)
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FILLS = {"fill_", "zero_"}  # which do not read what they write to
PICKS = {"gather", "embedding", "index", "index_select"}  # which read of their first argument what they give
PUTS = {"scatter_", "scatter_add_", "index_add_"}  # which touch of it as many elements as their last argument has
ROW = 32768  # elements of a row that one kernel holds until its sum is known


@torch.library.custom_op("roofline::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """A fused kernel that shares heads of keys: (B, H, T, K) and the sums (B, H, T)."""
    raise RuntimeError("it has no values")


@torch.library.custom_op("roofline::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward pass."""
    raise RuntimeError("it has no values")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    # as kernels write it: merging heads copies nothing
    return torch.empty_like(q.transpose(1, 2)).transpose(1, 2), q.new_empty(q.shape[:-1], dtype=torch.float32)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.causal = inputs[3]


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attention_backward(grad, *ctx.saved_tensors, ctx.causal), None


attention.register_autograd(_backward, setup_context=_keep)


class Gpu(FakeTensorMode):
    """Tensors without values that say that they are on a GPU; autograd's engine, which would look for one, is told otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return META
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == META:
            kwargs["device"] = CUDA
        return super().__torch_dispatch__(func, types, args, kwargs)


class Autocast(kernels.Kernels):
    """Automatic mixed precision, and attention by a fused kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (IS_META, IS_CUDA):
            return func == IS_CUDA
        if func is F.rms_norm:  # of tensors that autograd takes for the meta device's it would be written out
            given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | (kwargs or {})
            return torch.ops.aten._fused_rms_norm(*given.values())[0]
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("q", "k", "v", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | (kwargs or {})
            q, k, v = (self._cast(x, self.autocast) for x in list(given.values())[:3])
            return attention(q, k, v, bool(given.get("is_causal")))[0]
        if not torch.is_autocast_enabled("cuda"):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@dataclass
class Trace(TorchDispatchMode):
    """Notes operators while it is entered."""

    learnt: int
    compiles: bool
    ops: list[Op] = field(default_factory=list)
    made: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    phase: str = "forward"
    block: bool = False
    region: int = 0
    inside: bool = False  # of the backward pass of a block
    handed: Tensor | None = None  # from a block to the next
    gradients: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.").split(".")[0] if str(func).startswith("aten.") else func._opname
        if name == "nonzero":  # the labelled tokens, whose number is stated
            return torch.empty(self.learnt, args[0].ndim, dtype=torch.int64, device=args[0].device)
        result = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        writes = any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments)
        seen = {x.untyped_storage()._cdata for x in inputs}
        view = bool(outputs) and not writes and all(x.untyped_storage()._cdata in seen for x in outputs)
        on_device = any(x.device.type == "cuda" for x in outputs)
        for x in outputs if on_device else ():
            storage = x.untyped_storage()
            if storage._cdata not in seen:
                self.numbers[storage._cdata] = len(self.made)
                self.made[len(self.made)] = StorageWeakRef(storage), storage.nbytes()
        if view or not on_device or name in FREE or name == "_assert_async":
            return result
        # autograd's engine needs no gradients of gradients; what is computed again does
        again = torch.is_grad_enabled() or (attends(name) and "backward" not in name)
        phase = "recompute" if self.phase == "backward" and again else self.phase
        fuses = (
            self.compiles
            and (self.block or (self.inside and self.phase == "backward"))
            and name not in PRODUCTS
            and not attends(name)
        )
        flops = self._flops(func, name, args, kwargs, result)
        reads, written = self._sizes(inputs), self._sizes(outputs)
        if name in FILLS:
            reads = {}
        if name in PICKS or name in PUTS:
            part = prod((result if name in PICKS else inputs[-1]).shape) * inputs[0].element_size()
            key = next(iter(self._sizes(inputs[:1])))
            reads[key] = min(part, reads[key])
            written = written if name in PICKS else {key: reads[key]}
        long = bool(inputs) and outputs[0].numel() * ROW < inputs[0].numel() and inputs[0].shape[-1] > ROW
        self.ops.append(Op(name, phase, flops, reads, written, (self.region, phase) if fuses else None, long))
        return result

    def _sizes(self, tensors: list[Tensor]) -> dict[int, int]:
        views = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in tensors}
        found: dict[int, int] = {}
        for x in views.values():
            storage = x.untyped_storage()
            key = self.numbers.get(storage._cdata, -storage._cdata)
            found[key] = min(found.get(key, 0) + x.numel() * x.element_size(), storage.nbytes())
        return found

    def _flops(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> float:
        if attends(name):
            backward = "backward" in name
            q, k = args[1 if backward else 0], args[2 if backward else 1]
            if "varlen" in name:  # samples side by side, of nearly one length: (T, H, K)
                places = next(i for i, x in enumerate(args) if isinstance(x, Tensor) and x.dtype == torch.int32)
                pairs = q.shape[0] * k.shape[0] / (args[places].shape[0] - 1)
                heads, causal = q.shape[1], next((x for x in args[places:] if isinstance(x, bool)), False)
            else:
                pairs, heads, causal = q.shape[0] * q.shape[2] * k.shape[2], q.shape[1], args[-1]
            return (10 if backward else 4) * pairs * heads * q.shape[-1] * (0.5 if causal else 1.0)
        formula = flop_registry.get(func._overloadpacket)
        return formula(*args, **kwargs, out_val=result) if formula is not None else 0.0

    def alive(self) -> dict[int, int]:
        """Bytes of what was made and is still held, by storage."""
        return {key: size for key, (reference, size) in self.made.items() if not reference.expired()}

    def apart(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is compiled as one region."""

        @wraps(function)
        def run(*args: Any) -> Any:
            self.enter_block()
            try:
                return function(*args)
            finally:
                self.block = False
                self.next_region()

        return run

    def enter_block(self, block: nn.Module | None = None, given: Any = ()) -> None:
        """A block begins; when the gradient of what it was given is there, its backward pass ends."""
        self.next_region()
        self.block = True
        for x in tree_leaves(given):
            if isinstance(x, Tensor) and x.requires_grad and x is not self.handed:
                x.register_hook(lambda _: self.next_region(inside=False))

    def leave_block(self, block: nn.Module, given: Any, found: Any) -> None:
        """A block ends; when the gradient of its result is there, its backward pass begins."""
        self.block = False
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(self.next_region)
                self.handed = x

    def next_region(self, *_: Any, inside: bool = True) -> None:
        """What comes is compiled apart from what was; in the backward pass, that of a block or of what stands outside."""
        self.region += 1
        self.inside = inside


@contextlib.contextmanager
def claimed(attention: str) -> Iterator[None]:
    """PyTorch does not look for a GPU before it turns automatic mixed precision on; a row without padding has no values to
    compare; the type of weights without values is no parameter's."""
    kept = activation_checkpointing.kept_operations() | {torch.ops.roofline.attention.default}
    changed = {
        (torch.cuda.amp.common, "amp_definitely_not_available"): lambda: False,
        (torch.cuda, "is_bf16_supported"): lambda *_: True,
        (attention_trial, "refusal"): lambda *_: None if attention == "varlen" else "left out",
        (attention_masks, "_unless_all"): lambda *_: None,
        (activation_checkpointing, "kept_operations"): lambda: kept,
        (next_token, "plain_layer"): lambda head: head.__self__.output_layer,
    }
    before = {(owner, name): getattr(owner, name) for owner, name in changed}
    for (owner, name), value in changed.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)
