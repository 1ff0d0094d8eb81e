"""Attention kernels on the claimed GPU, as if their compiled parts loaded: the formula stands in their place.

Of xformers its own dispatcher says which calls have a kernel for the device's capability and the type; PyTorch's kernel for
uneven lengths takes no float32 and no odd widths.
"""

from __future__ import annotations

import itertools
import logging
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.layers import attention_trial

calls: Counter[str] = Counter()  # of each kernel


@contextmanager
def kernels_load(*names: str) -> Iterator[None]:
    """Inside, the kernels of these run: xformers, varlen, and flash, which is installed by that."""
    attention_trial.refusal.cache_clear()
    if "xformers" in names:
        logging.getLogger("xformers").setLevel(logging.ERROR)  # it says at its import that nothing is built
    from xformers import ops
    from xformers.ops.fmha import common

    flash = types.ModuleType("flash_attn")
    flash.__spec__ = ModuleSpec("flash_attn", None)
    flash.flash_attn_func, flash.flash_attn_varlen_func = _flash, _flash_uneven
    with (
        patch.dict(sys.modules, {"flash_attn": flash} if "flash" in names else {}),
        patch.object(common, "_built_with_cuda", "xformers" in names),
        patch.object(ops, "memory_efficient_attention", _xformers),
        patch("torch.nn.attention.varlen.varlen_attn", _varlen if "varlen" in names else _no_varlen),
    ):
        yield
    attention_trial.refusal.cache_clear()


def _xformers(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None) -> Tensor:
    """(B, T, H, K). Raises NotImplementedError where xformers would."""
    from xformers.ops.fmha import common, dispatch

    inputs = common.Inputs(q, k, v, attn_bias, p, scale)
    inputs.validate_inputs()
    forward = dispatch._dispatch_fw(inputs, needs_gradient=True)
    dispatch._dispatch_bw(inputs, forward.VARLEN_LSE_PACKED)
    calls["xformers"] += 1
    shape = (1, 1, q.shape[1], k.shape[1])
    mask = None if attn_bias is None else attn_bias.materialize(shape, dtype=q.dtype, device=q.device)
    found = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, dropout_p=p, scale=scale)
    return found.transpose(1, 2)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """(T, H, K), as FlashAttention: a causal query sees the last keys of its piece."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8:
        raise RuntimeError(f"FlashAttention takes no {q.dtype} heads of width {q.shape[-1]}")
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    calls["varlen"] += 1
    runs = [itertools.pairwise(getattr(starts, "inner", starts).tolist()) for starts in (starts_q, starts_k)]
    pieces = []
    for (start, end), (first, last) in zip(*runs, strict=True):
        assert end - start <= longest_q
        assert last - first <= longest_k
        shown = [x.transpose(0, 1)[None] for x in (q[start:end], k[first:last], v[first:last])]
        square = torch.ones(end - start, last - first, dtype=torch.bool, device=q.device)
        mask = square.tril(last - first - end + start) if window_size == (-1, 0) else square
        pieces.append(F.scaled_dot_product_attention(*shown, mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(pieces)


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool) -> Tensor:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"is_causal": causal, "scale": softmax_scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, None, dropout_p, **options).transpose(1, 2)


def _flash_uneven(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, softmax_scale: float | None, causal: bool, **_: Any) -> Tensor:
    return _varlen(q, k, v, *lengths, scale=softmax_scale, window_size=(-1, 0 if causal else -1), enable_gqa=True)


def _no_varlen(*args: Any, **kwargs: Any) -> Tensor:
    raise NotImplementedError("Could not run 'aten::_flash_attention_forward' with arguments from the 'CUDA' backend")
