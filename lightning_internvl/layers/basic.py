"""Small layers that several parts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.layers.attention import attend

_on_meta: torch.dtype | None = None  # of `torch.autocast`, which does not know the meta device


@contextmanager
def autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """What `autocast_type` says of tensors without values: for plans."""
    global _on_meta
    before, _on_meta = _on_meta, dtype
    try:
        yield
    finally:
        _on_meta = before


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The lower type of automatic mixed precision, where it is on."""
    if device.type == "meta":
        return _on_meta
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def lowered(x: Tensor) -> Tensor:
    """A state in the lower type of automatic mixed precision, where it is on: layers that add to it
    then neither read nor write it in float32."""
    dtype = autocast_type(x.device)
    return x if dtype is None else x.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where operations keep the type of what they read. Norms compute in float32 inside of one
    kernel whatever they read; automatic mixed precision would copy their states to float32 and
    hand out float32."""
    if autocast_type(device) is None:
        return nullcontext()
    if device.type == "meta":
        return autocast_on_meta(None)
    return torch.autocast(device.type, enabled=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019), computed in float32,
    in the type of `x`."""
    with without_autocast(x.device):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class RMSNorm(nn.Module):
    """See `rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, in the type of what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with without_autocast(x.device):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


NORMS: dict[str, type[RMSNorm | LayerNorm]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of a sample with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The branch, times `scale`, of features: both factors go into one small tensor, which
        saves passes over all tokens."""
        if self.training and self.rate > 0.0:
            keep = 1.0 - self.rate
            kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < keep
            factor = kept.to(x.dtype if scale is None else scale.dtype) / keep
            scale = factor if scale is None else factor * scale
        return x if scale is None else x * scale.to(x.dtype)


def rotary_table(positions_T: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, (T, dim) float32, half-split as in LLaMA."""
    frequency = theta ** -(torch.arange(0, dim, 2, device=positions_T.device).float() / dim)
    angles = positions_T.float()[:, None] * frequency
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTK: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to queries or keys of shape (B, H, T, K)."""
    cos, sin = (t.to(x_BHTK.dtype) for t in table)
    first, second = x_BHTK.chunk(2, dim=-1)
    lower, upper = sin.chunk(2, dim=-1)
    # The sign goes into the small table, which saves a pass over all queries and keys.
    return x_BHTK * cos + torch.cat([second, first], dim=-1) * torch.cat([-lower, upper], dim=-1)


def resize_positions(table_1PD: Tensor, grid: int | tuple[int, int], special: int = 1) -> Tensor:
    """Resize a learned square position table to another grid of patches, bicubic in float32;
    entries before it are kept.

    Args:
        table_1PD: (1, special + g*g, D)
        grid: rows and columns of patches; one number for a square.
        special: entries in front that stand for no patch (CLS).

    Returns:
        (1, special + rows*columns, D), in the dtype of the table
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    front, patches = table_1PD[:, :special], table_1PD[:, special:]
    old = round(patches.shape[1] ** 0.5)
    if (old, old) == (rows, columns):
        return table_1PD
    square = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([front, square.flatten(2).transpose(1, 2).to(table_1PD.dtype)], dim=1)


def keep_random(x_NPD: Tensor, keep: float, special: int = 1) -> Tensor:
    """A share of patch tokens, drawn for each image; `special` ones in front stay (FLIP)."""
    n, tokens, dim = x_NPD.shape
    kept = max(1, round((tokens - special) * keep))
    order = torch.rand(n, tokens - special, device=x_NPD.device).argsort(dim=1)[:, :kept] + special
    patches = x_NPD.gather(1, order[..., None].expand(-1, -1, dim))
    return torch.cat([x_NPD[:, :special], patches], dim=1)


def linear_with_bias(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer with a bias that lies elsewhere: (..., D) -> (..., O). An adapted or quantised
    layer works as itself."""
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight, bias)
    return layer(x) if bias is None else layer(x) + bias


class AttentionPooling(nn.Module):
    """Pools a sequence into one vector: the mean token asks, all tokens answer.

    InternVL-14B `clip_projector`: separate LayerNorms (eps 1e-5) and separate biases for query, key
    and value.
    """

    def __init__(self, dim: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(dim, eps=1e-5) for _ in range(3))
        self.cross_attn = _PoolingAttention(dim, heads, out_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, out_dim)"""
        query = x_BTD.mean(dim=1, keepdim=True)
        return self.cross_attn(self.norm1_q(query), self.norm1_k(x_BTD), self.norm1_v(x_BTD)).squeeze(1)


class _PoolingAttention(nn.Module):
    def __init__(self, dim: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(3))
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = split_heads(linear_with_bias(self.q, query, self.q_bias), self.heads)
        k = split_heads(linear_with_bias(self.k, key, self.k_bias), self.heads)
        v = split_heads(linear_with_bias(self.v, value, self.v_bias), self.heads)
        return self.proj(merge_heads(attend(q, k, v)))


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, heads, T, D / heads)"""
    return x_BTD.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BHTK: Tensor) -> Tensor:
    """(B, H, T, K) -> (B, T, H * K)"""
    return x_BHTK.transpose(1, 2).flatten(2)


def init_normal(module: nn.Module, std: float) -> None:
    """Normal weights with the given deviation, zero biases: how fresh parts start."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(m.weight, std=std)
            if (bias := getattr(m, "bias", None)) is not None:
                nn.init.zeros_(bias)


@torch.no_grad()
def fill_with_mean(table: Tensor, known: int) -> None:
    """Rows from `known` on become the mean of those before: the start of new words."""
    table[known:] = table[:known].mean(dim=0, dtype=torch.float32).to(table.dtype)


def feed_forward(dim: int, ratio: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear without biases, numbered as in OpenFlamingo's checkpoints."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, ratio * dim, bias=False), nn.GELU(), nn.Linear(ratio * dim, dim, bias=False)
    )
