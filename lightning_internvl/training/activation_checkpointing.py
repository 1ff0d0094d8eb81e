"""Activation checkpointing: blocks keep little of their forward pass and compute it again when
their backward pass comes.

A block is a sharding unit of a part. `full` keeps what a block reads and computes all of it again,
one third more work in a step (Chen et al. 2016). `selective` keeps the results of matrix products
and of attention too and computes only what is cheap again: norms, activation functions, rotary
positions, dropout (after Korthikanti et al. 2022, section 4.1). Losses and gradients stay the same,
bit by bit: the random numbers of a block are drawn again as they were.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _CachedTorchDispatchMode, checkpoint, create_selective_checkpoint_contexts

from lightning_internvl.protocols import HasShardingUnits

# What `selective` keeps, by the library that registers it. Not `bmm`: where attention has no kernel
# of its own, that would be the scores of all pairs of tokens.
_KEPT = {
    "aten": (
        "mm", "addmm", "convolution", "_grouped_mm", "_scaled_mm",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward", "_efficient_attention_forward",
    ),
    "torch_attn": ("_varlen_attn",),
    "xformers_flash": ("flash_fwd",),
    "xformers_flash3": ("flash_fwd",),
    "flash_attn": ("_flash_attn_forward", "_flash_attn_varlen_forward"),
}  # fmt: skip
# of packages that register theirs when they are imported, which is when attention is chosen
_LATE = ("xformers.ops.fmha.flash", "xformers.ops.fmha.flash3", "flash_attn")
with suppress(ImportError):
    import torch.nn.attention.varlen


def kept_operations() -> frozenset[Any]:
    """The operations whose results `selective` keeps: matrix products, and attention by whatever
    library computes it. FlexAttention is not among them: what it is compiled to is no operation."""
    return _registered(tuple(package in sys.modules for package in _LATE))


@functools.cache
def _registered(imported: tuple[bool, ...]) -> frozenset[Any]:
    pairs = ((getattr(torch.ops, library), name) for library, names in _KEPT.items() for name in names)
    return frozenset(getattr(library, name).default for library, name in pairs if hasattr(library, name))


def recompute_blocks(model: nn.Module, settings: Mapping[str, str | None]) -> None:
    """Let the blocks of parts compute again what backward needs. Names of tensors stay; hooks of a
    block run once, as before.

    Call it before weights are divided and before blocks are compiled.

    Args:
        settings: by part: full, selective or None.
    """
    for name, kind in settings.items():
        part = getattr(model, name, None)
        if kind and isinstance(part, HasShardingUnits):
            for block in part.sharding_units():
                # A bound method, so that a copy of the model gets one of its own.
                block.forward = MethodType(_FORWARDS[kind], block)


def _full(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not has_backward(block, args, kwargs):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _selective(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not has_backward(block, args, kwargs):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


_FORWARDS = {"full": _full, "selective": _selective}


class _Giving(_CachedTorchDispatchMode):
    """Gives what was kept and lets all else run. PyTorch's own wants every operation to come again,
    but weights that are divided inside a block, as adapters are, are not gathered in the same way
    twice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs) if func in kept_operations() else func(*args, **kwargs or {})


def _contexts() -> Any:
    keeping, giving = create_selective_checkpoint_contexts(list(kept_operations()))
    if not torch.compiler.is_compiling():
        giving.__class__ = _Giving  # what its constructor takes differs between versions of PyTorch
    return keeping, giving


def has_backward(block: nn.Module, *inputs: Any) -> bool:
    """Whether a backward pass of the block can follow; a frozen block that reads frozen things
    keeps nothing anyway."""
    if not torch.is_grad_enabled():
        return False
    read = (x.requires_grad for x in tree_leaves(inputs) if isinstance(x, Tensor))
    return any(read) or any(parameter.requires_grad for parameter in block.parameters())
