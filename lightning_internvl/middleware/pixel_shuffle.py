"""The connector of InternVL 1.5 and later: neighbouring patches side by side, LayerNorm, two-layer
MLP (Chen et al. 2024, section 3.1; official `modeling_internvl_chat.py`).

Letters: N images or tiles, P visual tokens (CLS first), D encoder width, G side of the patch grid,
F neighbours to a side, H decoder width.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_internvl.messages import check_choice
from lightning_internvl.protocols import Part

VERSIONS = ("v1", "v2")


class PixelShuffleMLP(Part):
    """Patches of one layer, CLS dropped, F x F as one token, through LayerNorm and MLP.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        patch_layer: which hidden state of the encoder is read.
        special_tokens: tokens that the encoder puts before its patches, such as CLS (completed from
            the encoder).
        factor: F; 2 gives a quarter of the tokens (official `downsample_ratio` 0.5).
        version: "v2" keeps the picture upright (1.5 and later); "v1" leaves rows and columns
            swapped (1.1, 1.2).
    """

    projection = "mlp1"

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        patch_layer: int = -1,
        special_tokens: int = 1,
        factor: int = 2,
        version: str = "v2",
    ) -> None:
        super().__init__()
        check_choice("pixel shuffle version", version, VERSIONS)
        if factor < 1:
            raise ValueError(f"pixel shuffle {factor=} must be 1 or more")
        self.layers = (patch_layer,)
        self.patch_layer, self.factor, self.version = patch_layer, factor, version
        self.skipped = special_tokens
        dim = encoder_dim * factor**2
        # Numbered as in the official checkpoints: norm, linear, activation, linear.
        self.mlp1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, decoder_dim), nn.GELU(), nn.Linear(decoder_dim, decoder_dim))

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for one image of `tokens_in` visual tokens, CLS included."""
        return (tokens_in - self.skipped) // self.factor**2

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self.mlp1]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """[(N, P, D)] -> (N, patches / F^2, H)"""
        patches = feats[0][:, self.skipped :]
        grid = round(patches.shape[1] ** 0.5)
        if grid**2 != patches.shape[1] or grid % self.factor:
            count = patches.shape[1]
            raise ValueError(f"{count} patches are no square grid that divides by {self.factor}")
        shuffled = pixel_shuffle(patches.unflatten(1, (grid, grid)), self.factor, self.version)
        return self.mlp1(shuffled.flatten(1, 2))


def pixel_shuffle(x_NHWC: Tensor, factor: int = 2, version: str = "v2") -> Tensor:
    """F x F neighbours as one cell, their channels one after the other in reading order: (N, H/F,
    W/F, F * F * C).

    With "v1" the map comes out transposed, as the first release had it: (N, W/F, H/F, F * F * C).
    """
    cells = x_NHWC.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # N, H/F, F, W/F, F, C
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return cells.permute(*order).flatten(3)
