"""Visual tokens computed before: the encoder where a checkpoint holds no tower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_internvl.protocols import Part


class Features(Part):
    """Hands on what it is given.

    Args:
        dim: width of the tokens.
        tokens: how many an image has.
    """

    def __init__(self, *, dim: int, tokens: int = 257) -> None:
        super().__init__()
        self.dim, self.tokens, self.image_size = dim, tokens, 1

    def num_tokens(self, image_size: int | None = None) -> int:
        """Visual tokens of one image."""
        return self.tokens

    def sharding_units(self) -> list[nn.Module]:
        """There is nothing to shard."""
        return []

    def forward(self, features_NPD: Tensor, *, layers: Sequence[int] = (-1,), keep: float = 1.0) -> list[Tensor]:
        """(N, P, D) once for each entry of `layers`.

        Raises:
            ValueError: for another width.
        """
        if features_NPD.shape[-1] != self.dim:
            given = f"features of width {features_NPD.shape[-1]}"
            raise ValueError(f"{given} where {self.dim} are expected; this model has no tower")
        return [features_NPD for _ in layers]
