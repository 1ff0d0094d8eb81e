"""The position-aware resampler of Qwen-VL: learned queries read the patches once (Bai et al. 2023,
section 2.1; official `visual.py`).

Letters: N images, P visual tokens, D encoder width, Q queries, H decoder width, G side of a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.basic import init_normal, merge_heads, resize_positions, split_heads
from lightning_internvl.protocols import Part


class Resampler(Part):
    """One cross-attention layer without a residual, then LayerNorm and a matrix.

    Queries and keys carry two-dimensional sine-cosine positions, values none. The table belongs to
    the grid of the queries; for the keys it is resized to the grid of the patches, as a learned
    table would be.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        num_queries: decoder tokens of a picture, a square number.
        head_dim: width of an attention head.
        patch_layer: which hidden state of the encoder is read.
        special_tokens: tokens that the encoder puts before its patches (completed from the
            encoder); they are left out.
        init_std: deviation of the initial queries and weights.
    """

    never_decays = ("query_tokens",)

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        num_queries: int = 256,
        head_dim: int = 128,
        patch_layer: int = -1,
        special_tokens: int = 1,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        grid = round(num_queries**0.5)
        if grid**2 != num_queries or num_queries < 1:
            raise ValueError(f"{num_queries=} must be a square number: the queries stand on a grid")
        if decoder_dim % head_dim or decoder_dim % 4:
            width = f"the decoder's width {decoder_dim}"
            raise ValueError(f"{width} must divide by {head_dim=}, and by 4 for the positions")
        self.layers, self.skipped = (patch_layer,), special_tokens
        self.num_queries, self.heads = num_queries, decoder_dim // head_dim
        self.query_tokens = nn.Parameter(torch.zeros(num_queries, decoder_dim))
        # Part of the checkpoint, but nothing that trains.
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(decoder_dim, grid))
        self.kv_proj = nn.Linear(encoder_dim, decoder_dim, bias=False)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(decoder_dim, eps=1e-6) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(decoder_dim, decoder_dim) for _ in range(4))
        self.proj = nn.Linear(decoder_dim, decoder_dim, bias=False)
        init_normal(self, init_std)
        nn.init.normal_(self.query_tokens, std=init_std)
        nn.init.normal_(self.proj.weight, std=decoder_dim**-0.5)

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens of one image, whatever its size."""
        return self.num_queries

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """[(N, P, D)] -> (N, Q, H)"""
        return self.proj(self.ln_post(self.resample(feats[0])))

    def resample(self, visual_NPD: Tensor) -> Tensor:
        """What the queries read: (N, P, D) -> (N, Q, H)."""
        values = self.ln_kv(self.kv_proj(visual_NPD[:, self.skipped :]))
        grid = round(values.shape[1] ** 0.5)
        if grid**2 != values.shape[1]:
            raise ValueError(f"{values.shape[1]} patches are no square grid")
        keys = values + resize_positions(self.positions[None], grid, special=0).to(values.dtype)
        queries = (self.ln_q(self.query_tokens) + self.positions.to(self.query_tokens.dtype)).expand(len(values), -1, -1)
        q, k, v = (split_heads(t, self.heads) for t in (self.q_proj(queries), self.k_proj(keys), self.v_proj(values)))
        return self.out_proj(merge_heads(attend(q, k, v)))


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Positions of a grid in reading order: (grid * grid, dim), float32.

    The first half of the channels tells the column, the second the row; each is the sines of all
    frequencies, then the cosines.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = line[None].expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()
