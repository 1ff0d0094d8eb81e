"""InternViT, the vision tower of InternVL (Chen et al. 2023, section 3.2; official
`modeling_intern_vit.py`).

Module names are those of the official checkpoint, below `vision_model.`; the 6B and the toy tower
differ in numbers only. Letters: N images, P tokens (CLS first), D width, S side of the image in
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_internvl.encoders.tower import Tower, embed_patches
from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.basic import (
    NORMS,
    DropPath,
    LayerNorm,
    RMSNorm,
    init_normal,
    keep_random,
    merge_heads,
    resize_positions,
    split_heads,
)
from lightning_internvl.layers.transformer import MLP, BlockList
from lightning_internvl.messages import check_choice
from lightning_internvl.protocols import TensorPlan


class InternViT(Tower):
    """Pixels to visual tokens.

    Args:
        image_size: side in pixels of the stored position table; other sizes are accepted at run time
            and resize the table.
        dim, depth, heads, mlp_dim, patch_size: the size of the tower (6B: 3200, 48, 25, 12800, 14).
        qk_norm: RMSNorm over the full width of queries and of keys, before the heads are split.
        qkv_bias: 6B has none.
        norm: "rms_norm" (6B) or "layer_norm" (300M).
        norm_eps, qk_norm_eps: added to the variance; None for queries and keys: as `norm_eps`.
        final_norm: a LayerNorm after the last block; no released tower has one.
        layer_scale: initial value of the residual scales.
        drop_path: rate of the last block; earlier blocks grow linearly from 0, or have the same
            rate with `drop_path_uniform`.
        init_std: deviation of the initial weights.
        embed_std: deviation of the initial CLS token and positions; None: as `init_std`.
    """

    block_list: ClassVar = "encoder.layers"
    roles: ClassVar = {"patch_embedding": ("embeddings.patch_embedding",)}

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        norm: str = "rms_norm",
        norm_eps: float = 1e-6,
        qk_norm_eps: float | None = None,
        final_norm: bool = False,
        layer_scale: float = 0.1,
        drop_path: float = 0.0,
        drop_path_uniform: bool = False,
        init_std: float = 0.02,
        embed_std: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("encoder norm", norm, NORMS)
        if dim % heads:
            raise ValueError(f"{dim=} must divide by {heads=}")
        self.dim, self.depth, self.image_size, self.patch_size = dim, depth, image_size, patch_size
        self.has_final_norm, self.mlp_dim = final_norm, mlp_dim
        self.embeddings = _Embeddings(image_size, patch_size, dim)
        # Plain Python floats: `torch.linspace(...).item()` would fail on the meta device.
        shares = [1 if drop_path_uniform else i / max(depth - 1, 1) for i in range(depth)]
        rates = [drop_path * share for share in shares]
        blocks = []
        for rate in rates:
            attention = _Attention(dim, heads, qk_norm, qkv_bias, qk_norm_eps or norm_eps)
            blocks.append(_Block(attention, mlp_dim, norm, norm_eps, layer_scale, rate))
        self.encoder = BlockList(blocks)
        self.layernorm = LayerNorm(dim, eps=norm_eps) if final_norm else nn.Identity()
        init_normal(self, init_std)
        # Patches enter at about unit size whatever their number of pixels, so that positions and
        # blocks are heard beside them.
        nn.init.normal_(self.embeddings.patch_embedding.weight, std=(3 * patch_size**2) ** -0.5)
        nn.init.normal_(self.embeddings.class_embedding, std=embed_std or init_std)
        nn.init.normal_(self.embeddings.position_embedding, std=embed_std or init_std)

    def resize(self, image_size: int) -> None:
        """Fit the stored position table to images of `image_size` pixels."""
        table = resize_positions(self.embeddings.position_embedding.detach(), image_size // self.patch_size)
        self.embeddings.position_embedding = nn.Parameter(table)
        self.image_size = image_size

    def tensor_plan(self) -> TensorPlan:
        """Layers that tensor parallelism divides: the MLPs, two thirds of a block. Attention stays
        whole: 25 heads (6B) are divided by few numbers, and the norms of queries and keys run over
        all of them."""
        return TensorPlan(("encoder.layers.*.mlp.fc1",), ("encoder.layers.*.mlp.fc2",), {"mlp_dim": self.mlp_dim})

    def forward(self, pixels_N3SS: Tensor, *, layers: Sequence[int] = (-1,), keep: float = 1.0) -> list[Tensor]:
        """Encode images.

        Args:
            layers: which hidden states to return, as in Hugging Face: 0 is the embedding output, -1
                the last block.
            keep: share of patch tokens kept, drawn per image (FLIP-like masking of stage 1); 1.0
                keeps all.

        Returns:
            One (N, P, D) tensor for each entry of `layers`; the last one after the final norm,
            where there is one.
        """
        numbers = self.layer_numbers(layers)
        x = self.embeddings(pixels_N3SS)
        if keep < 1.0:
            x = keep_random(x, keep)
        return self.hidden_states(x, numbers)

    def finish(self, x_NPD: Tensor) -> Tensor:
        """The last block's output after the final norm, where there is one."""
        return self.layernorm(x_NPD)


class _Embeddings(nn.Module):
    def __init__(self, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        size = pixels_N3SS.shape[-1]
        if pixels_N3SS.shape[-2] != size:
            raise ValueError(f"images of {tuple(pixels_N3SS.shape[-2:])} pixels: they must be square")
        patches = embed_patches(pixels_N3SS, self.patch_embedding, self.patch_size)
        cls = self.class_embedding.expand(len(patches), -1, -1).to(patches.dtype)
        positions = resize_positions(self.position_embedding, size // self.patch_size)
        return torch.cat([cls, patches], dim=1) + positions.to(patches.dtype)


class _Block(nn.Module):
    def __init__(self, attn: _Attention, mlp_dim: int, norm: str, eps: float, scale: float, drop: float) -> None:
        super().__init__()
        dim = attn.proj.out_features
        self.norm1, self.norm2 = NORMS[norm](dim, eps=eps), NORMS[norm](dim, eps=eps)
        self.attn = attn
        self.mlp = MLP(dim, mlp_dim, "gelu")
        self.ls1, self.ls2 = nn.Parameter(scale * torch.ones(dim)), nn.Parameter(scale * torch.ones(dim))
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)), self.ls1)
        return x + self.drop_path(self.mlp(self.norm2(x)), self.ls2)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qk_norm: bool, qkv_bias: bool, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (RMSNorm(dim, eps) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(merge_heads(attend(q, k, v)))
