"""The connector of DeepSeek-VL 7B: each of two towers through a layer of its own, then one layer
over both (Lu et al. 2024, section 3.1; official `projector.py`, `low_high_hybrid_split_mlp_gelu`).

Letters: N images, T tokens, H decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.protocols import Part


class HybridMLP(Part):
    """Tokens of a low and of a high tower, half of the decoder's width each, side by side (high
    first), GELU, linear.

    Args:
        encoder_dims: widths of the low and of the high tower (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        patch_layer: which hidden state of the low tower is read.

    Raises:
        ValueError: for a decoder of odd width.
    """

    reads = "pair"  # of states, one of each tower

    def __init__(self, *, encoder_dims: Sequence[int], decoder_dim: int, patch_layer: int = -1) -> None:
        super().__init__()
        if decoder_dim % 2:
            raise ValueError(f"the decoder's width {decoder_dim} must be even: each tower gets one half")
        low, high = encoder_dims
        self.layers = (patch_layer,)
        self.low_up_proj = nn.Linear(low, decoder_dim // 2)
        self.high_up_proj = nn.Linear(high, decoder_dim // 2)
        self.proj = nn.Linear(decoder_dim, decoder_dim)

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens of one image."""
        return tokens_in

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """[low (N, T, D), high (N, T, D')] -> (N, T, H)"""
        low, high = feats
        if low.shape[1] != high.shape[1]:
            given = f"{low.shape[1]} tokens and the high one {high.shape[1]}"
            raise ValueError(f"the low tower gave {given}; they must be as many")
        return self.proj(F.gelu(torch.cat([self.high_up_proj(high), self.low_up_proj(low)], dim=-1)))
