"""xformers on the claimed GPU: as if its compiled part loaded. Its own dispatcher says which calls have a kernel for the device's
capability and the type; the kernel's place is taken by the formula."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.layers import attention_trial


@contextmanager
def xformers_by_formula() -> Iterator[None]:
    """Inside, xformers can be chosen."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it says at its import that nothing is built
    from xformers import ops
    from xformers.ops.fmha import common

    attention_trial.refusal.cache_clear()
    with patch.object(common, "_built_with_cuda", True), patch.object(ops, "memory_efficient_attention", by_formula):
        yield
    attention_trial.refusal.cache_clear()


def by_formula(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None) -> Tensor:
    """(B, T, H, K), as xformers' own. Raises NotImplementedError where it would."""
    from xformers.ops.fmha import common, dispatch

    inputs = common.Inputs(q, k, v, attn_bias, p, scale)
    inputs.validate_inputs()
    forward = dispatch._dispatch_fw(inputs, needs_gradient=True)
    dispatch._dispatch_bw(inputs, forward.VARLEN_LSE_PACKED)
    shape = (1, 1, q.shape[1], k.shape[1])
    mask = None if attn_bias is None else attn_bias.materialize(shape, dtype=q.dtype, device=q.device)
    found = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, dropout_p=p, scale=scale)
    return found.transpose(1, 2)
