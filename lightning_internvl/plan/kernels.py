"""What a GPU would do differently from the meta device: attention that keeps no scores, and
automatic mixed precision.

Letters: B rows, H heads, G heads of keys and values, T query positions, S key positions, K width of
a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_internvl.layers.attention import for_heads
from lightning_internvl.layers.basic import autocast_on_meta, autocast_type

META = torch.device("meta")
# The operations that `torch.autocast` on CUDA computes in the lower precision, and those that it
# computes in float32.
LOWER = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
FULL = {
    "layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "normalize",
    "norm", "exp", "log", "pow", "__pow__", "rsqrt", "sum", "cumsum", "prod", "logsumexp",
    "cosine_similarity", "mse_loss", "l1_loss", "softplus", "binary_cross_entropy_with_logits",
}  # fmt: skip
# The operations that fill a tensor in place.
FILLS = {
    "normal_", "trunc_normal_", "uniform_", "fill_", "zero_", "zeros_", "ones_", "constant_",
    "xavier_uniform_", "kaiming_uniform_",
}  # fmt: skip

# Products of rows sorted by expert, which the meta device computes in bfloat16 alone.
GROUPED = {"grouped_mm", "_grouped_mm"}
# What gives as many elements as the values of a tensor say.
CHOICES = {"__getitem__", "unique"}


class Kernels(TorchFunctionMode):
    """Computes with meta tensors what a GPU would.

    Args:
        autocast: the lower type of automatic mixed precision; None without.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        # of weights in the lower type, made once in a forward as `torch.autocast` does
        self.copies: dict[int, Tensor] = {}
        self.copied: set[int] = set()  # their storages
        self.attended = 0  # bytes of what attention has given
        self.entered = ExitStack()

    def __enter__(self) -> Any:
        self.entered.enter_context(autocast_on_meta(self.autocast))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.entered.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attends = func is F.scaled_dot_product_attention
        low = autocast_type(META)
        if low is not None and (attends or name in LOWER):
            args, kwargs = self._cast(args, low), self._cast(kwargs, low)
        elif low is not None and name in FULL:
            args, kwargs = self._cast(args, torch.float32), self._cast(kwargs, torch.float32)
        # every kind gives the same shape and keeps nothing; bicubic takes long on the meta device
        if func is F.interpolate:
            kwargs = kwargs | {"mode": "nearest", "align_corners": None, "antialias": False}
        if name in CHOICES and (chosen := _all_chosen(name, args, kwargs)) is not None:
            return chosen
        if name in GROUPED:  # every row meets the matrix of one expert, whichever that is
            args, kwargs = (args[0], args[1][0]), {}
            func = torch.mm
        result = _attend(*args, **kwargs) if attends else func(*args, **kwargs)
        self.attended += result.nbytes if attends else 0
        return result

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, dict):
            return {key: self._cast(one, dtype) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._cast(one, dtype) for one in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(dtype)
            self.copied.add(self.copies[id(value)].untyped_storage()._cdata)
        return self.copies[id(value)]


class Unfilled(TorchFunctionMode):
    """Leaves out the filling of new weights, which does nothing on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _all_chosen(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The most that a choice by values can give: all elements, as if a mask were true throughout
    and no two elements were equal. None for an index that is no mask."""
    x = args[0]
    if name == "unique":
        places = torch.empty_like(x, dtype=torch.int64)
        return (x.flatten(), places) if kwargs.get("return_inverse") else x.flatten()
    mask = args[1]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return None
    return x.flatten(0, mask.ndim - 1) if mask.ndim else None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of a memory-efficient kernel; a bool mask is copied once a
    call, as PyTorch does."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    return _Attention.apply(query, key, value, attn_mask)


class _Attention(torch.autograd.Function):
    """Shapes, FLOPs (two products forward, four backward) and what is kept: no (T, S) matrix."""

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (for_heads(x, q_BHTK.shape[1]) for x in (k_BGSK, v_BGSK))
        out = (q_BHTK @ k.transpose(-1, -2)) @ v
        # as kernels write it: merging heads copies nothing
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        log_sums = torch.empty(q_BHTK.shape[:-1], dtype=torch.float32, device=q_BHTK.device)
        ctx.save_for_backward(q_BHTK, k_BGSK, v_BGSK, out, log_sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        q, k_BGSK, v_BGSK, _, _, _ = ctx.saved_tensors
        k, v = (for_heads(x, q.shape[1]) for x in (k_BGSK, v_BGSK))
        scores = grad_BHTK @ v.transpose(-1, -2)
        grads = scores @ k, scores.transpose(-1, -2) @ q, scores.transpose(-1, -2) @ grad_BHTK
        shapes = q, k_BGSK, v_BGSK
        pairs = zip(shapes, grads, strict=True)
        return *(None if grad is None else torch.empty_like(x) for x, grad in pairs), None
