"""Kernels for masks described by lengths: FlexAttention, xformers, flash-attn, and PyTorch's own
for uneven lengths.

Letters: B rows, H heads, G heads of keys and values, T query positions, S key positions, K width of
a head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lightning_internvl.layers.attention_masks import Mask, Varlen, on_device


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """PyTorch's FlexAttention: (B, H, T, K)."""
    return _flex_kernel(q.device.type)(
        q, k, v, block_mask=block_mask(mask, q.device), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@functools.cache
def _flex_kernel(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel) if device == "cuda" else kernel


def block_mask(mask: Mask, device: torch.device) -> object:
    """What FlexAttention wants of a mask: which blocks of 128 x 128 are empty, full, mixed."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, _, queries, keys = mask.shape
    compiled = device.type == "cuda"  # blocks are then counted without a square of tokens
    return mask.once(
        ("flex", device),
        lambda: create_block_mask(mask.sees(device), rows, None, queries, keys, device=device, _compile=compiled),
    )


# --- (B, T, H, K), or uneven lengths side by side as (all, H, K) --------------------------------


def side_by_side(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float, scale: float | None) -> Tensor:
    """All pieces of all rows in one call of a kernel for uneven lengths, or in two where some are
    causal: (B, H, T, K)."""
    rows, heads, queries, width = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, H, K)
    groups = mask.varlen(q.device)
    whole = len(groups) == 1 and groups[0].query_places is None
    out = q.new_zeros(0 if whole else rows * queries, heads, width)
    for group in groups:
        places, seen = group.query_places, group.key_places
        own_q = q if places is None else q.index_select(0, places)
        own_k, own_v = (x if seen is None else x.index_select(0, seen) for x in (k, v))
        part = _UNEVEN[backend](own_q, own_k, own_v, group, mask, dropout, scale)
        out = part if places is None else out.index_copy(0, places, part)
    return out.unflatten(0, (rows, queries)).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, scale: float | None) -> Tensor:
    from xformers.ops import LowerTriangularMask

    return _xformers_call(q, k, v, LowerTriangularMask() if causal else None, dropout, scale)


def _xformers_uneven(q: Tensor, k: Tensor, v: Tensor, group: Varlen, mask: Mask, dropout: float, scale: float | None) -> Tensor:
    bias = mask.once(("xformers", group.causal, q.device), lambda: xformers_bias(group, q.device))
    return _xformers_call(q[None], k[None], v[None], bias, dropout, scale)[0]


def xformers_bias(group: Varlen, device: torch.device) -> object:
    """The block-diagonal mask of xformers for pieces side by side."""
    from xformers.ops.fmha import attn_bias

    kind = "BlockDiagonalMask"
    if group.causal:
        kind = "BlockDiagonalCausalMask" if group.queries == group.keys else "BlockDiagonalCausalFromBottomRightMask"
    return getattr(attn_bias, kind).from_seqlens(group.queries, group.keys, device=device)


def _xformers_call(q: Tensor, k: Tensor, v: Tensor, bias: object, dropout: float, scale: float | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    shared = q.shape[2] // k.shape[2]
    if shared > 1:  # heads that share keys and values have no backward here
        k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    return memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, dropout_p=dropout, softmax_scale=scale, causal=causal)


def cumulative_lengths(lengths: list[int]) -> Tensor:
    """Where each piece begins among all, and the end of the last: int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")


def _flash_uneven(q: Tensor, k: Tensor, v: Tensor, group: Varlen, mask: Mask, dropout: float, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    lengths = _lengths(group, mask, q.device)
    return flash_attn_varlen_func(q, k, v, *lengths, dropout_p=dropout, softmax_scale=scale, causal=group.causal)


def _torch_uneven(q: Tensor, k: Tensor, v: Tensor, group: Varlen, mask: Mask, dropout: float, scale: float | None) -> Tensor:
    """FlashAttention of PyTorch itself, from 2.11 on: one call for a whole batch of packed rows, and
    heads that share keys without copies of them, where `scaled_dot_product_attention` would be
    called once for each sample. It has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    shared, window = q.shape[1] != k.shape[1], (-1, 0 if group.causal else -1)
    found = varlen_attn(q, k, v, *_lengths(group, mask, q.device), scale=scale, window_size=window, enable_gqa=shared)
    return cast(Tensor, found)  # not asked for more


def _lengths(group: Varlen, mask: Mask, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where each piece begins among queries and among keys, and the longest of both."""
    starts_q, starts_k = mask.once(
        ("starts", group.causal, device),
        lambda: [on_device(cumulative_lengths(lengths), device) for lengths in (group.queries, group.keys)],
    )
    return starts_q, starts_k, max(group.queries), max(group.keys)


EVEN = {"xformers": _xformers, "flash": _flash}
_UNEVEN = {"xformers": _xformers_uneven, "flash": _flash_uneven, "varlen": _torch_uneven}
