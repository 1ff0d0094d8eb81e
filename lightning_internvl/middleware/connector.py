"""Plain connectors from patches to the decoder's embeddings: one linear layer (LLaVA v1,
MiniGPT-4), or an MLP (LLaVA 1.5, InternVL-Chat without QLLaMA).

Letters: N images, P visual tokens, D encoder width, T decoder tokens of an image, H decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_internvl.protocols import Part


def projection(in_dim: int, out_dim: int, layers: int = 2, bias: bool = True) -> nn.Sequential:
    """Linear layers with GELU between them, with the parameter names `0`, `2`, ... of LLaVA's
    checkpoints (`mlp2x_gelu`)."""
    modules: list[nn.Module] = [nn.Linear(in_dim, out_dim, bias=bias)]
    for _ in range(layers - 1):
        modules += [nn.GELU(), nn.Linear(out_dim, out_dim, bias=bias)]
    return nn.Sequential(*modules)


class _Connector(Part):
    """Tokens of the encoder, each on its own, several layers side by side."""

    def __init__(self, patch_layer: int | Sequence[int], special_tokens: int, keep_special: bool) -> None:
        super().__init__()
        self.layers = (patch_layer,) if isinstance(patch_layer, int) else tuple(patch_layer)
        self.keep_special, self.skipped = keep_special, 0 if keep_special else special_tokens

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for one image of `tokens_in` visual tokens, special ones included."""
        return tokens_in - self.skipped

    def patches(self, feats: list[Tensor]) -> Tensor:
        """One (N, P, D) a layer -> (N, T, layers * D)"""
        kept = [states[:, self.skipped :] for states in feats]
        return kept[0] if len(kept) == 1 else torch.cat(kept, dim=-1)


class MLPConnector(_Connector):
    """Patches of one encoder layer through an MLP.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        patch_layer: which hidden state of the encoder is read, or which ones (InternVL-Chat 1.0:
            -4; LLaVA: -2).
        special_tokens: tokens that the encoder puts before its patches, such as CLS (completed from
            the encoder).
        keep_special: whether the decoder gets these too (LLaVA's `cls_patch`).
        depth: linear layers.
        bias: whether these have biases.
    """

    projection = "mlp1"

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        patch_layer: int | Sequence[int] = -1,
        special_tokens: int = 1,
        keep_special: bool = False,
        depth: int = 2,
        bias: bool = True,
    ) -> None:
        super().__init__(patch_layer, special_tokens, keep_special)
        if depth < 1:
            raise ValueError(f"an MLP has 1 or more layers: {depth=}")
        self.depth = depth
        self.mlp1 = projection(len(self.layers) * encoder_dim, decoder_dim, depth, bias)

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self.mlp1]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """One (N, P, D) a layer -> (N, T, H)"""
        return self.mlp1(self.patches(feats))


class LinearConnector(_Connector):
    """Patches of one encoder layer through one linear layer.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        patch_layer: which hidden state of the encoder is read, or which ones (LLaVA v1: -2).
        special_tokens: tokens that the encoder puts before its patches, such as CLS (completed from
            the encoder).
        keep_special: whether the decoder gets these too.
    """

    projection = "proj"

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        patch_layer: int | Sequence[int] = -1,
        special_tokens: int = 1,
        keep_special: bool = False,
    ) -> None:
        super().__init__(patch_layer, special_tokens, keep_special)
        self.proj = nn.Linear(len(self.layers) * encoder_dim, decoder_dim)

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self.proj]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """One (N, P, D) a layer -> (N, T, H)"""
        return self.proj(self.patches(feats))
