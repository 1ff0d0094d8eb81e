"""One attention primitive for every part we write and for the language models that we wrap, and the
backend that computes it.

The backend is chosen before a model is built: `attention=auto|xformers|flash|flex|sdpa|math` on the
command line. `auto` takes what runs of xformers and flash-attn on the device and in the type of the
trainer, else PyTorch's own kernels; the choice and its reason are printed. A call that the backend
has no kernel for, as for heads of an odd width, goes to PyTorch's.

Letters: B rows, H heads, G heads of keys and values, T query positions, S key positions, K width of
a head.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.choices import BACKENDS
from lightning_internvl.layers import attention_kernels as kernels, attention_trial as trial
from lightning_internvl.layers.attention_masks import Mask, Run
from lightning_internvl.layers.attention_trial import CAUSAL, EVEN, INSTALL, LENGTHS, PACKAGES, dtype_name, package_title
from lightning_internvl.messages import check_choice

DEVICES = {"xformers": ("cuda",), "flash": ("cuda",), "flex": ("cuda",)}  # others run on any
NO_KERNEL = {
    "xformers": "it has no kernel for",
    "flash": "it has no kernel for",
    "flex": "PyTorch's FlexAttention has no backward on",
}
_asked, _backend = "auto", "sdpa"


def choose_backend(name: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Resolve and install the attention backend for this process.

    Args:
        name: of `BACKENDS`.
        device: where the model will be.
        dtype: of the matrix products: under automatic mixed precision the lower type.

    Returns:
        The backend in force and the reason, for the log.

    Raises:
        ValueError: for an unknown name, or for a backend that cannot run on this device and in this
            type.
    """
    global _asked, _backend
    check_choice("attention", name, BACKENDS)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if name == "auto":
        backend, reason = _best(device, dtype)
    else:
        _check(name, device, dtype)
        backend, reason = name, "asked for by the configuration"
    _asked, _backend = name, backend
    return backend, reason


@contextmanager
def keep_backend() -> Iterator[None]:
    """Whatever is chosen inside, afterwards the backend is the one from before."""
    global _asked, _backend
    before = _asked, _backend
    try:
        yield
    finally:
        _asked, _backend = before


def requested_backend() -> str:
    """What the configuration says, `auto` among it: wrapped language models leave their own
    attention only when told to."""
    return _asked


def _best(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    able = [x for x in PACKAGES if device.type in DEVICES[x] and _is_installed(x)]
    faults = {name: _fault(name, device, dtype) for name in able}
    found = next((name for name, fault in faults.items() if fault is None), None)
    if found:
        return found, f"{package_title(found)} runs on {device.type} in {dtype_name(dtype)}"
    if faults:
        told = [f"{package_title(name)} cannot run here: {fault}" for name, fault in faults.items()]
        return "sdpa", "; ".join(told)
    if all(device.type not in DEVICES[name] for name in PACKAGES):
        return "sdpa", f"xformers and flash-attn have no kernel for {device.type}"
    return "sdpa", "neither xformers nor flash-attn is installed"


def _check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    fault = _fault(name, device, dtype)
    if fault is None:
        return
    low = dtype == torch.float32 and _fault(name, device, torch.bfloat16) is None
    help_ = "; with trainer.precision=bf16-mixed it can" if low else ""
    advice = "use attention=auto, sdpa or math"
    raise ValueError(f"attention={name} cannot run here: {fault}{help_}; {advice}")


def _is_installed(name: str) -> bool:
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None


def _fault(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on a device and in a type."""
    if name not in DEVICES:
        return None
    if not _is_installed(name):
        return f"the package {PACKAGES[name]} is not installed ({INSTALL[name]})"
    if device.type not in DEVICES[name]:
        return f"{NO_KERNEL[name]} {device.type}, where the model is to run"
    return trial.fault(name, device, dtype)


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention; H is a multiple of G: heads of queries share keys.

    Args:
        mask: bool, broadcastable to (B, H, T, S), True where a query may look; or one described by
            lengths, of which no backend but `math` makes a square. Exclusive with `causal`.
        causal: position t sees keys 0..t (T equals S).
        dropout: share of the attention weights that are dropped.
        bias: added to the scaled scores, broadcastable to (B, H, T, S); exclusive with `mask` and
            `causal`.
        scale: of the scores; None: K ** -0.5.

    Returns:
        (B, H, T, K)
    """
    if isinstance(mask, Mask):
        return _attend_by_lengths(q_BHTK, k_BGSK, v_BGSK, mask, dropout, scale)
    if _backend == "math":
        return _math(q_BHTK, k_BGSK, v_BGSK, mask, causal, dropout, bias, scale)
    if _backend in PACKAGES and mask is None and bias is None:
        lowered = _lowered(q_BHTK, k_BGSK, v_BGSK)
        if _runs(*lowered[:2], CAUSAL if causal else EVEN, dropout):
            q, k, v = (x.transpose(1, 2) for x in lowered)  # these kernels want (B, T, H, K)
            return kernels.EVEN[_backend](q, k, v, causal, dropout, scale).transpose(1, 2)
    # Masks that differ by row are left to PyTorch, whose kernels read a bool mask without first
    # making a float copy per head.
    return _sdpa(q_BHTK, k_BGSK, v_BGSK, mask if bias is None else bias, causal, dropout, scale)


# loops over lengths: a compiled block calls it as it is, and is not compiled anew for other lengths
@torch.compiler.disable
def _attend_by_lengths(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask, dropout: float, scale: float | None) -> Tensor:
    rows, _, queries, keys = mask.shape
    if (len(q_BHTK), q_BHTK.shape[2], k_BGSK.shape[2]) != (rows, queries, keys):
        given = f"{len(q_BHTK)} rows of {q_BHTK.shape[2]} queries and {k_BGSK.shape[2]} keys"
        wanted = f"{rows} rows of {queries} queries and {keys} keys"
        raise ValueError(f"the mask is for {wanted}, not for {given}")
    if _backend == "math":
        dense = mask.dense(q_BHTK.device)
        return _math(q_BHTK, k_BGSK, v_BGSK, dense, False, dropout, None, scale) * dense.any(dim=-1, keepdim=True)
    if _backend in PACKAGES:
        lowered = _lowered(q_BHTK, k_BGSK, v_BGSK)
        if _runs(*lowered[:2], LENGTHS, dropout):
            return kernels.side_by_side(_backend, *lowered, mask, dropout, scale)
    if _backend == "flex" and dropout == 0.0:  # FlexAttention has no dropout
        return kernels.flex(*_lowered(q_BHTK, k_BGSK, v_BGSK), mask, scale)
    if _backend == "sdpa" and q_BHTK.is_cuda and dropout == 0.0:
        lowered = _lowered(q_BHTK, k_BGSK, v_BGSK)
        if trial.refusal("varlen", *_call(*lowered[:2], LENGTHS, dropout)) is None:
            return kernels.side_by_side("varlen", *lowered, mask, dropout, scale)
    return _by_pieces(q_BHTK, k_BGSK, v_BGSK, mask, dropout, scale)


# --- PyTorch ------------------------------------------------------------------------------------


def _math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The formula as written, softmax in float32: the reference of every other backend."""
    k, v = (for_heads(x, q.shape[1]) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float | None) -> Tensor:
    shared = q.shape[1] != k.shape[1]
    # with a mask, the kernels that share heads would make a square of scores
    if shared and mask is not None:
        k, v, shared = for_heads(k, q.shape[1]), for_heads(v, q.shape[1]), False
    options: dict[str, Any] = {"is_causal": causal, "scale": scale, "enable_gqa": shared}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, **options)


def _by_pieces(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float, scale: float | None) -> Tensor:
    """One call for every piece: a packed row costs the sum of squared lengths."""
    if len(set(mask.rows)) == 1:
        return _pieces_of_row(q, k, v, mask, 0, dropout, scale)
    rows = zip(q.split(1), k.split(1), v.split(1), strict=True)
    found = [_pieces_of_row(*row, mask, i, dropout, scale) for i, row in enumerate(rows)]
    return torch.cat(found)


def _pieces_of_row(q: Tensor, k: Tensor, v: Tensor, mask: Mask, row: int, dropout: float, scale: float | None) -> Tensor:
    parts, done = [], 0
    for piece, count in mask.alike(row):
        (start, end), (queries, keys) = piece.queries, piece.counts
        end += (count - 1) * queries
        if count > 1:
            own_q, own_k, own_v = (_stacked(x[:, :, start:end], count) for x in (q, k, v))
            attended = _unstacked(_sdpa(own_q, own_k, own_v, None, piece.causal, dropout, scale), count)
        else:
            seen_k, seen_v = (_taken(x, piece.keys) for x in (k, v))
            square = None
            if piece.causal and keys > queries:  # PyTorch's flag means the first keys, not the last
                square = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
            attended = _sdpa(q[:, :, start:end], seen_k, seen_v, square, piece.causal and square is None, dropout, scale)
        parts += [attended.new_zeros(*q.shape[:2], start - done, v.shape[-1]), attended]
        done = end
    last = parts[-1] if parts else v
    rest = last.new_zeros(*q.shape[:2], q.shape[2] - done, v.shape[-1])
    parts = [part for part in (*parts, rest) if part.shape[2]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _stacked(x_BHTK: Tensor, count: int) -> Tensor:
    """So many runs of one length as rows: (B * count, H, T / count, K)."""
    return x_BHTK.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def _unstacked(x: Tensor, count: int) -> Tensor:
    return x.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)


def _taken(x: Tensor, runs: tuple[Run, ...]) -> Tensor:
    parts = [x[:, :, start:end] for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def for_heads(x_BGSK: Tensor, heads: int) -> Tensor:
    """Keys or values once for each head of queries."""
    return x_BGSK if x_BGSK.shape[1] == heads else x_BGSK.repeat_interleave(heads // x_BGSK.shape[1], dim=1)


def _lowered(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the lower type of automatic mixed precision, which other libraries' kernels do not see."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _runs(q_BHTK: Tensor, k_BGSK: Tensor, kind: str, dropout: float) -> bool:
    """Whether the backend has a kernel for a call."""
    return trial.runs(_backend, *_call(q_BHTK, k_BGSK, kind, dropout))


def _call(q_BHTK: Tensor, k_BGSK: Tensor, kind: str, dropout: float) -> tuple[torch.device, torch.dtype, int, str, bool, bool]:
    """What decides whether a kernel takes a call."""
    shared = q_BHTK.shape[1] != k_BGSK.shape[1]
    # a constant also where `torch.compile` takes sizes for variables
    width = operator.index(q_BHTK.shape[-1])
    return q_BHTK.device, q_BHTK.dtype, width, kind, shared, dropout > 0
