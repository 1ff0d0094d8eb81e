"""The vision tower of SigLIP (Zhai et al. 2023; google-research/big_vision), also of DeepSeek-VL.

Module names are those of transformers' `SiglipVisionModel`. Letters: N images, P tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.layers.transformer import MLP
from lightning_internvl.messages import check_choice

HEADS = ("first", "unused", "none")


class SiglipViT(CLIPViT):
    """A CLIP tower without CLS token and first norm; its last norm is put on every patch.

    Args:
        head: what becomes of the attention-pooling head: its vector stands in front of the patches
            of the last layer, as a CLS token would ("first": contrastive use); the tower has it and
            does not use it ("unused": some checkpoints of chat models); or it has none ("none").
        act: "gelu_pytorch_tanh" (SigLIP) or "gelu" (exact; timm, DeepSeek-VL).
        post_norm: "all", or "unused" where patches leave as the last block made them (towers inside
            LLaVA).
        tower: `image_size`, `patch_size`, `dim`, `depth`, `heads`, `mlp_dim` and `embed_std`, as in
            `CLIPViT`.
    """

    no_summary_if: ClassVar[dict[str, tuple[Any, ...]]] = {"head": ("unused", "none")}
    leaves_margin = True  # so400m at 384 px has 27 patches of 14 px a side

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        act: str = "gelu_pytorch_tanh",
        norm_eps: float = 1e-6,
        head: str = "first",
        post_norm: str = "all",
        embed_std: float | None = None,
    ) -> None:
        check_choice("head", head, HEADS)
        super().__init__(
            image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, act=act, norm_eps=norm_eps, cls=False, patch_bias=True, pre_norm=False,
            post_norm=post_norm, embed_std=embed_std,
        )  # fmt: skip
        self.use_head = head == "first"
        self.special_tokens = int(self.use_head)
        self.head = PoolingHead(dim, heads, mlp_dim, act, norm_eps) if head != "none" else None

    def hidden_states(self, x: Tensor, numbers: Sequence[int], *inputs: Any) -> list[Tensor]:
        """Run the blocks that are needed (see `Tower`). Where the pooled vector stands in front of
        the last layer, zeros do so in the others, so that all have their patches in the same
        places."""
        states = super().hidden_states(x, numbers, *inputs)
        if not self.use_head:
            return states
        return [x if number == self.depth else F.pad(x, (0, 0, 1, 0)) for x, number in zip(states, numbers, strict=True)]

    def finish(self, x_NPD: Tensor) -> Tensor:
        """The last block's output after the norm, behind the pooled vector if any."""
        x = super().finish(x_NPD)
        if self.head is None or not self.use_head:
            return x
        return torch.cat([self.head(x)[:, None], x], dim=1)


class PoolingHead(nn.Module):
    """One learned query reads all patches, then an MLP (attention pooling of big_vision)."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, act: str, eps: float) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, mlp_dim, act)
        nn.init.normal_(self.probe, std=dim**-0.5)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """(N, P, D) -> (N, D)"""
        probe = self.probe.expand(len(x_NPD), -1, -1).to(x_NPD.dtype)
        pooled = self.attention(probe, x_NPD, x_NPD, need_weights=False)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]
