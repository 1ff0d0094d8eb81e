"""What the vision transformers share: tokens, sharding units, states of chosen layers.

Letters: N images, P tokens, D width, H and W sides of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.protocols import Part


class Tower(Part):
    """A stack of blocks over patches.

    Attributes:
        block_list: the name of the list of blocks below the tower.
    """

    block_list: ClassVar = "blocks"
    dim: int
    depth: int
    image_size: int
    patch_size: int

    def num_tokens(self, image_size: int | None = None) -> int:
        """Visual tokens of one square image at the last layer, special ones included."""
        return special_tokens(self) + ((image_size or self.image_size) // self.patch_size) ** 2

    def resize(self, image_size: int) -> None:
        """Expect images of `image_size` pixels; here all is resized at run time."""
        self.image_size = image_size

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return list(self.get_submodule(self.block_list).children())

    def layer_numbers(self, layers: Sequence[int]) -> list[int]:
        """Layers as numbers from 0 to `depth`: 0 is what enters the first block, -1 the last block.

        Raises:
            ValueError: for layers that do not exist.
        """
        if unknown := [i for i in layers if not -self.depth - 1 <= i <= self.depth]:
            known = f"with {self.depth} blocks they run from 0 to {self.depth}, or -1 backwards"
            raise ValueError(f"layers {unknown} do not exist; {known}")
        return [i % (self.depth + 1) for i in layers]

    def hidden_states(self, x: Tensor, numbers: Sequence[int], *inputs: Any) -> list[Tensor]:
        """Run the blocks that are needed.

        Args:
            x: what enters the first block.
            numbers: layers, as `layer_numbers` gives them.
            inputs: what each block reads besides.
        """
        states = {0: x}
        for number, block in enumerate(self.sharding_units()[: max(numbers)], start=1):
            x = block(x, *inputs)
            if number in numbers:
                states[number] = x
        if self.depth in numbers:
            states[self.depth] = self.finish(states[self.depth])
        return [states[number] for number in numbers]

    def finish(self, x: Tensor) -> Tensor:
        """The last block's output as it leaves the tower."""
        return x


def special_tokens(tower: nn.Module) -> int:
    """Tokens in front of the patches; one (CLS) where the tower does not say otherwise."""
    return getattr(tower, "special_tokens", 1)


def embed_patches(pixels_N3HW: Tensor, layer: nn.Conv2d, patch_size: int) -> Tensor:
    """(N, P, D) of a convolution whose stride is its kernel: one matrix product over flat patches,
    faster on every device. What is left behind the last whole patch is left out, as there.

    Raises:
        ValueError: for sides shorter than a patch.
    """
    height, width = pixels_N3HW.shape[-2:]
    if min(height, width) < patch_size:
        raise ValueError(f"images of {height} x {width} pixels: both sides must hold a patch of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    whole = pixels_N3HW[..., : rows * patch_size, : columns * patch_size].to(layer.weight.dtype)
    grid = whole.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
    # copied in one pass, where `F.unfold` gathers value by value and leaves each patch strided
    patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    # the bias apart: in one operation with it sums would be rounded otherwise on a CPU
    x = F.linear(patches, layer.weight.flatten(1))
    return x if layer.bias is None else x + layer.bias.to(x.dtype)
