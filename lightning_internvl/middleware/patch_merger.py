"""The connector of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: neighbouring patches side by side through a
two-layer MLP (Wang et al. 2024, section 2.1; official `modeling_qwen2_vl.py`, `modeling_qwen2_5_vl.py`
and `modeling_qwen3_vl.py`, `PatchMerger`). Parameter names are those of the first two's checkpoints,
below `visual.merger.`.

Letters: P patches of all pictures, D encoder width, F neighbours to a side, H decoder width.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_internvl.layers.basic import NORMS
from lightning_internvl.messages import check_choice
from lightning_internvl.protocols import Part


class PatchMerger(Part):
    """A norm of each patch, then F x F neighbours as one token through an MLP.

    Neighbours must follow each other, as the processor of any resolution and the tower keep them,
    so the merger needs no grid.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        factor: F.
        patch_layer: which hidden state of the encoder is read.
        norm: "layer_norm", or "rms_norm" as in Qwen2.5-VL.
        norm_eps: added to the variance.
        joined_norm: whether neighbours are normalised together, as one token.
    """

    reads = "blocks"  # of neighbouring patches, as the tower of Qwen2-VL orders them

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        factor: int = 2,
        patch_layer: int = -1,
        norm: str = "layer_norm",
        norm_eps: float = 1e-6,
        joined_norm: bool = False,
    ) -> None:
        super().__init__()
        check_choice("patch merger norm", norm, NORMS)
        if factor < 1:
            raise ValueError(f"patch merger {factor=} must be 1 or more")
        self.layers, self.factor, self.norm, self.joined_norm = (patch_layer,), factor, norm, joined_norm
        dim = encoder_dim * factor**2
        self.ln_q = NORMS[norm](dim if joined_norm else encoder_dim, eps=norm_eps)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, decoder_dim))

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for one picture of `tokens_in` patches."""
        return tokens_in // self.factor**2

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self.mlp]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """[(P, D)] -> (P / F^2, H), or with a dimension of pictures in front, [(N, P, D)] -> (N, P
        / F^2, H)"""
        if feats[0].shape[-2] % self.factor**2:
            count, side = feats[0].shape[-2], self.factor
            raise ValueError(f"{count} patches do not divide into blocks of {side} x {side}")
        x = feats[0] if self.joined_norm else self.ln_q(feats[0])
        x = x.unflatten(-2, (-1, self.factor**2)).flatten(-2)
        return self.mlp(self.ln_q(x) if self.joined_norm else x)
