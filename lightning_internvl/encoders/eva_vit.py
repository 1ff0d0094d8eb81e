"""The EVA-CLIP ViT of the BLIP-2 family (ViT-g/14 of LAVIS, 39 of its 40 blocks): biases for
queries and values, none for keys.

Sources: LAVIS `eva_vit.py`; `Blip2VisionModel` of transformers. All tokens are handed on, CLS among
them; the LayerNorm that follows (`ln_vision`) belongs to the middleware. Letters: N images, P
tokens (CLS first), D width, S sides of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lightning_internvl.encoders.tower import Tower, embed_patches
from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.basic import (
    DropPath,
    init_normal,
    keep_random,
    linear_with_bias,
    merge_heads,
    resize_positions,
    split_heads,
)
from lightning_internvl.messages import check_choice


class EvaViT(Tower):
    """Pixels to visual tokens.

    Args:
        image_size: side in pixels of the stored position table; at other sizes, which need not be
            square, the table is resized.
        dim, depth, heads, mlp_dim, patch_size: the size of the tower (g: 1408, 39, 16, 6144, 14).
        qkv_bias: biases of queries and values.
        k_bias: a bias of keys too. No softmax sees it, but checkpoints of transformers hold one.
        norm_eps: added to the variance.
        act: activation of the MLPs.
        drop_path: rate of the last block; earlier ones grow linearly from 0.
        init_std: deviation of the initial weights.
        embed_std: deviation of the initial CLS token and positions; None: as `init_std`.
    """

    special_tokens = 1  # CLS stands before the patches
    roles: ClassVar = {"patch_embedding": ("patch_embedding",)}

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        qkv_bias: bool = True,
        k_bias: bool = False,
        norm_eps: float = 1e-6,
        act: str = "gelu",
        drop_path: float = 0.0,
        init_std: float = 0.02,
        embed_std: float | None = None,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim=} must divide by {heads=}")
        check_choice("encoder act", act, ACT2FN)
        if k_bias and not qkv_bias:
            raise ValueError("k_bias needs qkv_bias")
        self.dim, self.depth, self.image_size, self.patch_size, self.act = dim, depth, image_size, patch_size, act
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        options: dict[str, Any] = {"qkv_bias": qkv_bias, "k_bias": k_bias, "eps": norm_eps, "act": act}
        self.blocks = nn.ModuleList(_Block(dim, heads, mlp_dim, drop=rate, **options) for rate in rates)
        init_normal(self, init_std)
        # Patches enter at about unit size whatever their number of pixels, so that positions and
        # blocks are heard beside them.
        nn.init.normal_(self.patch_embedding.weight, std=(3 * patch_size**2) ** -0.5)
        nn.init.normal_(self.class_embedding, std=embed_std or init_std)
        nn.init.normal_(self.position_embedding, std=embed_std or init_std)

    def resize(self, image_size: int) -> None:
        """Fit the stored position table to images of `image_size` pixels."""
        grid = image_size // self.patch_size
        self.position_embedding = nn.Parameter(resize_positions(self.position_embedding.detach(), grid))
        self.image_size = image_size

    def forward(self, pixels_N3SS: Tensor, *, layers: Sequence[int] = (-1,), keep: float = 1.0) -> list[Tensor]:
        """Encode images.

        Args:
            layers: which hidden states to return: 0 is the embedding output, -1 the last block.
            keep: share of patch tokens kept, drawn per image; 1.0 keeps all.

        Returns:
            one (N, P, D) for each entry of `layers`

        Raises:
            ValueError: for layers that do not exist, or images smaller than a patch.
        """
        numbers = self.layer_numbers(layers)
        x = self._embed(pixels_N3SS)
        if keep < 1.0:
            x = keep_random(x, keep)
        return self.hidden_states(x, numbers)

    def _embed(self, pixels_N3SS: Tensor) -> Tensor:
        patches = embed_patches(pixels_N3SS, self.patch_embedding, self.patch_size)
        height, width = pixels_N3SS.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        cls = self.class_embedding.expand(len(patches), -1, -1).to(patches.dtype)
        return torch.cat([cls, patches], dim=1) + resize_positions(self.position_embedding, grid)


class _Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, mlp_dim: int, *, qkv_bias: bool, k_bias: bool, eps: float, act: str, drop: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = _Attention(dim, heads, qkv_bias, k_bias)
        self.mlp = _MLP(dim, mlp_dim, act)
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool, k_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) if qkv_bias else None for _ in range(2))
        self.k_bias = nn.Parameter(torch.zeros(dim)) if k_bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
            bias = torch.cat([self.q_bias, k_bias, self.v_bias])
        q, k, v = (split_heads(t, self.heads) for t in linear_with_bias(self.qkv, x, bias).chunk(3, dim=-1))
        return self.proj(merge_heads(attend(q, k, v)))


class _MLP(nn.Module):
    def __init__(self, dim: int, mlp_dim: int, act: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim), ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
