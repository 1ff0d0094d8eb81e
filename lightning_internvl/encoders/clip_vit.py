"""The vision tower of CLIP (Radford et al. 2021, section 2.4; openai/CLIP `model.py`), also of
LLaVA and XComposer2.

Module names are those of transformers' `CLIPVisionModel`. Letters: N images, P tokens (CLS first),
D width, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_internvl.encoders.tower import Tower, embed_patches
from lightning_internvl.layers.basic import keep_random, resize_positions
from lightning_internvl.layers.transformer import Block, BlockList, block_plan, init_blocks
from lightning_internvl.protocols import TensorPlan

POST_NORMS = ("cls", "all", "unused")


class CLIPViT(Tower):
    """Pixels to visual tokens.

    Args:
        image_size: side in pixels of the stored position table; pictures of any other size, square
            or not, are accepted at run time and resize the table. What is left of a side behind the
            last whole patch is not seen (SigLIP so400m: 384 = 27 * 14 + 6).
        dim, depth, heads, mlp_dim, patch_size: the size of the tower (L/14: 1024, 24, 16, 4096,
            14).
        act: "quick_gelu" (OpenAI), "gelu" or "gelu_pytorch_tanh".
        norm_eps: added to the variance.
        cls: a learned token in front of the patches.
        patch_bias: whether the patch layer has a bias; CLIP has none.
        pre_norm: a LayerNorm before the first block.
        post_norm: what the LayerNorm after the last block is put on: the CLS token alone ("cls",
            CLIP: patches leave as the last block made them), every token ("all", SigLIP), or
            nothing ("unused": held only because the checkpoint has it; LLaVA).
        embed_std: deviation of the initial CLS token and positions; None: D^-0.5, as OpenAI has it.

    Attributes:
        special_tokens: tokens of the last layer that come before its patches.
    """

    block_list: ClassVar = "encoder.layers"
    roles: ClassVar = {"patch_embedding": ("embeddings.patch_embedding",)}
    no_summary_if: ClassVar = {"cls": (False,)}

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        act: str = "quick_gelu",
        norm_eps: float = 1e-5,
        cls: bool = True,
        patch_bias: bool = False,
        pre_norm: bool = True,
        post_norm: str = "cls",
        embed_std: float | None = None,
    ) -> None:
        super().__init__()
        if post_norm not in POST_NORMS or (post_norm == "cls" and not cls):
            raise ValueError(f"{post_norm=} is not possible with {cls=}; valid choices: {', '.join(POST_NORMS)}")
        self.dim, self.depth, self.image_size, self.patch_size = dim, depth, image_size, patch_size
        self.special_tokens, self.post_norm = int(cls), post_norm
        self.heads, self.mlp_dim = heads, mlp_dim
        self.embeddings = _Embeddings(image_size, patch_size, dim, cls, patch_bias, embed_std or dim**-0.5)
        self.pre_layrnorm = nn.LayerNorm(dim, eps=norm_eps) if pre_norm else nn.Identity()
        self.encoder = BlockList([Block(dim, heads, mlp_dim, act, norm_eps) for _ in range(depth)])
        self.post_layernorm: nn.Module = nn.LayerNorm(dim, eps=norm_eps)
        init_blocks(self.encoder.layers, dim)

    def resize(self, image_size: int) -> None:
        """Fit the stored position table to images of `image_size` pixels."""
        self.embeddings.resize(image_size // self.patch_size)
        self.image_size = image_size

    def tensor_plan(self) -> TensorPlan:
        """Layers that tensor parallelism divides."""
        return block_plan("encoder.layers.*", self.heads, self.mlp_dim)

    def forward(self, pixels_N3SS: Tensor, *, layers: Sequence[int] = (-1,), keep: float = 1.0) -> list[Tensor]:
        """Encode images.

        Args:
            layers: which hidden states to return, as in Hugging Face: 0 is the input of the first
                block, -1 the last block's output, under `post_norm`.
            keep: share of patch tokens kept, drawn per image (FLIP); 1.0 keeps all.

        Returns:
            One (N, P, D) tensor for each entry of `layers`.
        """
        numbers = self.layer_numbers(layers)
        x = self.embeddings(pixels_N3SS)
        x = keep_random(x, keep, self.embeddings.special) if keep < 1.0 else x
        x = self.pre_layrnorm(x)
        return self.hidden_states(x, numbers)

    def finish(self, x_NPD: Tensor) -> Tensor:
        """The last block's output as it leaves the tower."""
        if self.post_norm == "all":
            return self.post_layernorm(x_NPD)
        if self.post_norm == "cls":
            return torch.cat([self.post_layernorm(x_NPD[:, :1]), x_NPD[:, 1:]], dim=1)
        return x_NPD


class _Embeddings(nn.Module):
    """Patches, a CLS token where there is one, and learned positions."""

    def __init__(self, image_size: int, patch_size: int, dim: int, cls: bool, bias: bool, std: float) -> None:
        super().__init__()
        self.patch_size, self.special = patch_size, int(cls)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, dim)) if cls else None
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=bias)
        self.position_embedding = nn.Parameter(torch.zeros(1, self.special + (image_size // patch_size) ** 2, dim))
        # Patches enter at about unit size whatever their number of pixels.
        nn.init.normal_(self.patch_embedding.weight, std=(3 * patch_size**2) ** -0.5)
        for tensor in (self.position_embedding, self.class_embedding):
            if tensor is not None:
                nn.init.normal_(tensor, std=std)

    def resize(self, grid: int) -> None:
        """Store the position table for `grid` x `grid` patches."""
        table = resize_positions(self.position_embedding.detach(), grid, self.special)
        self.position_embedding = nn.Parameter(table, requires_grad=self.position_embedding.requires_grad)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        x = embed_patches(pixels_N3HW, self.patch_embedding, self.patch_size)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        height, width = pixels_N3HW.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        return x + resize_positions(self.position_embedding, grid, self.special).to(x.dtype)
