"""SigLIP 2 NaFlex with pictures of several sizes in one batch, at their own proportions (Tschannen et
al. 2025, section 2.4.2), handed on in blocks of neighbours as `encoders.qwen2_vit` does.

Letters: P patches of all pictures, C values of a patch, N pictures, L patches of the largest, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.encoders.hf_vision import HFVision
from lightning_internvl.encoders.qwen2_vit import Grid, as_grids, patch_places


class HFNaFlex(HFVision):
    """Flat patches of pictures of any size to visual tokens. Shorter pictures are padded and masked
    inside the tower; its pooling head is left out.

    Args:
        pretrained, config, image_size: of `HFVision`; the square of `image_size` is what the processor
            lets a picture have at most.
        merge_size: patches to a side of a block, in whose order patches come and go.

    Raises:
        ValueError: for a tower that reads squares alone.
    """

    gives = "blocks"
    inputs = ("image_grid_thw",)

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        image_size: int | None = None,
        merge_size: int = 2,
    ) -> None:
        super().__init__(pretrained=pretrained, config=config, image_size=image_size, pool=False)
        self.merge_size = merge_size
        if not self.flat:
            raise ValueError(
                f"a {self.tower.config.model_type} reads squares; choose encoder=hf, or the weights of SigLIP 2 NaFlex"
            )

    def blank(self, pixel_values: Tensor) -> dict[str, Any]:
        """The smallest picture, of nothing: what the tower reads in a batch without pictures."""
        side = self.merge_size
        return {"pixel_values": pixel_values.new_zeros(side**2, *pixel_values.shape[1:]), "image_grid_thw": [(1, side, side)]}

    def forward(  # type: ignore[override]  # of other inputs
        self, pixels_PC: Tensor, *, image_grid_thw: Tensor | Sequence[Grid], layers: Sequence[int] = (-1,), keep: float = 1.0
    ) -> list[Tensor]:
        """Encode pictures.

        Args:
            pixels_PC: flat patches (channel, row, column inside), in blocks of `merge_size` x
                `merge_size`.
            image_grid_thw: (1, h, w) of each picture, (N, 3) or a list; frames of a video count as
                pictures.
            layers, keep: of `HFVision`.

        Returns:
            One (P, D) tensor for each entry of `layers`.

        Raises:
            ValueError: for patches of another size.
        """
        patch, grids = self.patch_size, as_grids(image_grid_thw)
        if pixels_PC.shape[1:] != (3 * patch**2,):
            given = f"patches have {pixels_PC.shape[1:].numel()} values, those of {patch} px have {3 * patch**2}"
            raise ValueError(f"{given}; give processor=naflex data.processor.patch_size={patch}")
        sizes = [(h, w) for t, h, w in grids for _ in range(t)]
        longest = max(h * w for h, w in sizes)
        blocks = [patch_places((1, h, w), self.merge_size) for h, w in sizes]
        within = zip(sizes, blocks, strict=True)
        place_P = torch.cat([n * longest + x[:, 0] * w + x[:, 1] for n, ((_, w), x) in enumerate(within)])  # of each among N x L
        place_P = place_P.to(pixels_PC.device, non_blocking=True)
        values_PC = pixels_PC.unflatten(1, (3, patch, patch)).permute(0, 2, 3, 1).flatten(1)
        rows_NLC = values_PC.new_zeros(len(sizes) * longest, values_PC.shape[1]).index_copy(0, place_P, values_PC)
        shapes_N2 = torch.tensor(sizes, device="cpu")
        # of four dimensions, which transformers takes as it is: it would look into another and wait for it
        mask_N11L = torch.arange(longest, device="cpu") < shapes_N2.prod(dim=1)[:, None, None, None]
        found = self.tower(
            pixel_values=rows_NLC.unflatten(0, (len(sizes), longest)),
            pixel_attention_mask=None if mask_N11L.all() else mask_N11L.to(pixels_PC.device, non_blocking=True),
            spatial_shapes=shapes_N2,
            output_hidden_states=True,
        )
        numbers = self.layer_numbers(layers)
        states = [found.last_hidden_state if n == self.depth else found.hidden_states[n] for n in numbers]
        return [state.flatten(0, 1)[place_P] for state in states]
