"""Two towers over two sizes of the same pictures (DeepSeek-VL, Lu et al. 2024, section 3.1).

Letters: N images, S side in pixels, P visual tokens, D width of a tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_internvl.encoders.tower import Tower, special_tokens
from lightning_internvl.protocols import Part


class HybridEncoder(Part):
    """A tower that reads `pixel_values` and one that reads the larger `high_res_pixel_values`; both
    give as many tokens.

    Args:
        low, high: any two encoders. Tokens that stand for no patch are left out of both.
        image_size, high_image_size: sides in pixels that the two are built for, where a
            configuration names them once for all.

    Attributes:
        dims: widths of the two; `dim` is that of the low one, for a middleware that reads nothing
            else.

    Raises:
        ValueError: if they give different numbers of tokens, or are built for other sides.
    """

    inputs = ("high_res_pixel_values",)
    special_tokens = 0
    gives = "pair"  # of states, one of each tower
    roles: ClassVar = {"patch_embedding": ("*.patch_embed*",)}

    def __init__(self, *, low: Tower, high: Tower, image_size: int | None = None, high_image_size: int | None = None) -> None:
        super().__init__()
        for name, side, tower in (("image_size", image_size, low), ("high_image_size", high_image_size, high)):
            if side not in (None, tower.image_size):
                built = f"its tower is built for {tower.image_size} px"
                raise ValueError(f"encoder.{name}={side}, but {built}; change both")
        self.low, self.high = low, high
        self.dim, self.dims = low.dim, (low.dim, high.dim)
        self.image_size, self.high_image_size = low.image_size, high.image_size
        if self.num_tokens() != (tokens := high.num_tokens() - special_tokens(high)):
            raise ValueError(
                f"the low tower gives {self.num_tokens()} tokens at {low.image_size} px, the high "
                f"one {tokens} at {high.image_size} px; they must be as many"
            )

    def num_tokens(self, image_size: int | None = None) -> int:
        """Visual tokens of one image."""
        return self.low.num_tokens(image_size) - special_tokens(self.low)

    def resize(self, image_size: int) -> None:
        """Fit the low tower to images of `image_size` pixels."""
        self.low.resize(image_size)
        self.image_size = image_size

    def blank(self, pixels_N3SS: Tensor) -> dict[str, Tensor]:
        """A picture of nothing in both sizes, which a batch without pictures runs."""
        sides = {"pixel_values": pixels_N3SS.shape[-1], "high_res_pixel_values": self.high_image_size}
        return {name: pixels_N3SS.new_zeros(1, 3, side, side) for name, side in sides.items()}

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [*self.low.sharding_units(), *self.high.sharding_units()]

    def forward(
        self,
        pixels_N3SS: Tensor,
        *,
        layers: Sequence[int] = (-1,),
        keep: float = 1.0,
        high_res_pixel_values: Tensor | None = None,
    ) -> list[Tensor]:
        """Encode images.

        Args:
            layers: hidden states of the low tower.
            high_res_pixel_values: the same pictures, larger, (N, 3, S', S').

        Returns:
            (N, P, D) of the low tower for each entry of `layers`, then the last of the high tower.

        Raises:
            ValueError: if the pictures of the two sizes are not as many.
        """
        if high_res_pixel_values is None:
            missing = "high_res_pixel_values is missing"
            raise ValueError(f"this encoder reads two sizes of every picture: {missing}")
        if len(high_res_pixel_values) != len(pixels_N3SS):
            high = f"{len(high_res_pixel_values)} in high_res_pixel_values"
            raise ValueError(f"{len(pixels_N3SS)} pictures in pixel_values, {high}")
        low = self.low(pixels_N3SS, layers=layers, keep=keep)
        high = self.high(high_res_pixel_values, layers=(-1,))
        return [
            *(state[:, special_tokens(self.low) :] for state in low),
            *(state[:, special_tokens(self.high) :] for state in high),
        ]
