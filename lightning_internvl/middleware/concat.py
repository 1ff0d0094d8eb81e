"""The connector of MiniGPT-4's LLaMA-2 variant and of MiniGPT-v2: four patches in a row become one
token (Zhu et al. 2023, Chen et al. 2023; official `minigpt4.py`).

Letters: N images, P visual tokens, D encoder width, K patches of a token, H decoder width.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_internvl.protocols import Part


class ConcatConnector(Part):
    """LayerNorm, special tokens dropped, K patches that follow each other in reading order side by
    side, one linear layer.

    The K patches lie in a row of the picture (where its width divides by K), not in a square; see
    `PixelShuffleMLP` for squares.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder).
        patch_layer: which hidden state of the encoder is read.
        concat: K.
        special_tokens: tokens that the encoder puts before its patches, such as CLS (completed from
            the encoder).
        norm_eps: of the LayerNorm.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        decoder_dim: int,
        patch_layer: int = -1,
        concat: int = 4,
        special_tokens: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if concat < 1:
            raise ValueError(f"a token is made of 1 or more patches: {concat=}")
        self.layers, self.concat, self.skipped = (patch_layer,), concat, special_tokens
        self.ln_vision = nn.LayerNorm(encoder_dim, eps=norm_eps)
        self.proj = nn.Linear(concat * encoder_dim, decoder_dim)

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for one image of `tokens_in` visual tokens, special ones included."""
        return (tokens_in - self.skipped) // self.concat

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [self.proj]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """[(N, P, D)] -> (N, patches / K, H)

        Raises:
            ValueError: for patches whose number K does not divide.
        """
        patches = self.ln_vision(feats[0])[:, self.skipped :]
        if patches.shape[1] % self.concat:
            count = patches.shape[1]
            raise ValueError(f"{count} patches do not divide by {self.concat}, of which a token is made")
        return self.proj(patches.unflatten(1, (-1, self.concat)).flatten(2))
