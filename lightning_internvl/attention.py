"""One attention primitive for every part we write, and the backend that computes it.

The backend is chosen once, at start: `attention=auto|xformers|sdpa|math` on the command line. `auto` takes xformers on a CUDA
device where it is installed, else PyTorch's own kernels; the choice and its reason are printed.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "xformers", "sdpa", "math")
_backend = "sdpa"


def choose_backend(name: str = "auto") -> tuple[str, str]:
    """Resolve and install the attention backend for this process.

    Returns:
        The backend in force and the reason, for the log.

    Raises:
        ValueError: for an unknown name, or for `xformers` where it cannot run.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"attention={name!r} is not known; valid choices: {', '.join(BACKENDS)}")
    has_xformers = importlib.util.find_spec("xformers") is not None
    if name == "xformers" and not (has_xformers and torch.cuda.is_available()):
        missing = "the package is not installed" if not has_xformers else "it has no CPU kernel and no CUDA device was found"
        raise ValueError(f"attention=xformers cannot run here: {missing}; use attention=auto, sdpa or math")
    if name == "auto" and has_xformers and torch.cuda.is_available():
        _backend, reason = "xformers", "a CUDA device and the xformers package were found"
    elif name == "auto":
        _backend, reason = "sdpa", "no CUDA device" if has_xformers else "xformers is not installed"
    else:
        _backend, reason = name, "asked for by the configuration"
    return _backend, reason


def attend(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention.

    Letters: B rows, H heads, T query positions, S key positions, K width of a head.

    Args:
        mask: bool, broadcastable to (B, H, T, S); True where a query may look. Exclusive with `causal`.
        causal: position t sees keys 0..t (T equals S).
        dropout: share of the attention weights that are dropped.
        bias: added to the scaled scores, broadcastable to (B, H, T, S); exclusive with `mask` and `causal`.

    Returns:
        (B, H, T, K)
    """
    if _backend == "math":
        return _math(q_BHTK, k_BHSK, v_BHSK, mask, causal, dropout, bias)
    if _backend == "xformers" and mask is None and bias is None:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        bias = LowerTriangularMask() if causal else None
        q, k, v = (x.transpose(1, 2) for x in (q_BHTK, k_BHSK, v_BHSK))  # xformers wants (B, T, H, K)
        return memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout).transpose(1, 2)
    # Masks that differ by row are left to PyTorch, whose kernels read a bool mask without first making a float copy per head.
    mask = mask if bias is None else bias
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def _math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, bias: Tensor | None = None
) -> Tensor:
    """The formula as written, softmax in float32: the reference that every other backend is tested against."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype) @ v
