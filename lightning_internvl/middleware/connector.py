"""The plain connector: a two-layer MLP from patches to the decoder's embeddings (InternVL-Chat without QLLaMA, LLaVA-1.5)."""

from __future__ import annotations

from torch import Tensor, nn


def projection(in_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, GELU, Linear, with the parameter names `0` and `2` of the LLaMA-family checkpoints (`mlp2x_gelu`)."""
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


class MLPConnector(nn.Module):
    """Patches of one encoder layer, CLS dropped, through an MLP.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        patch_layer: which hidden state of the encoder is read (InternVL-Chat 1.0: -4).
    """

    def __init__(self, *, encoder_dim: int, decoder_dim: int, patch_layer: int = -1) -> None:
        super().__init__()
        self.layers = (patch_layer,)
        self.mlp1 = projection(encoder_dim, decoder_dim)

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for one image of `tokens_in` visual tokens, CLS included."""
        return tokens_in - 1

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self.mlp1]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """[(N, P, D)] -> (N, P - 1, H)"""
        return self.mlp1(feats[0][:, 1:])
