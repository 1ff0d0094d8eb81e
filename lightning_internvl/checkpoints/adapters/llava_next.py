"""LLaVA-NeXT (LLaVA 1.6) as transformers' `LlavaNextForConditionalGeneration` reads it: LLaVA with
pictures in a grid of squares."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning_internvl.checkpoints.adapters.llava_native import TOP, LlavaNative
from lightning_internvl.checkpoints.name_rules import Config, NameRule, rename
from lightning_internvl.middleware.anyres import AnyresMLP
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class LlavaNext(LlavaNative):
    NAME = "LLaVA-NeXT of transformers (model_type 'llava_next')"
    MODEL_TYPES = ("llava_next",)
    ARCHITECTURE = "LlavaNextForConditionalGeneration"
    TOP: ClassVar[Config] = {**TOP, "image_grid_pinpoints": GRIDS}

    def rules(self, config: Config) -> list[NameRule]:
        return [*super().rules(config), rename("middleware.image_newline", "image_newline")]

    def connector(self, top: Config, image_size: int, **options: Any) -> MLPConnector:
        return AnyresMLP(grids=_grids(top["image_grid_pinpoints"], image_size), **self.kind(top), **options)

    def kind(self, top: Config) -> Config:
        """Settings of the connector that only this system's config has."""
        return {}

    def kind_fields(self, connector: AnyresMLP, model: VLM) -> Config | None:
        """What `kind` reads, and the token of videos; None if the config cannot hold the model."""
        reads_more = connector.map_squares or connector.frame_pool or model.video_token_id is not None
        return None if reads_more else {}

    def connector_fields(self, connector: MLPConnector, model: VLM) -> Config | None:
        if not isinstance(connector, AnyresMLP) or (own := self.kind_fields(connector, model)) is None:
            return None
        side = model.encoder.image_size
        return {"image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in connector.grids], **own}


def _grids(pinpoints: list[list[int]], side: int) -> list[list[int]]:
    """Pixels as squares. Raises ValueError for what is no whole number of them."""
    if uneven := [one for one in pinpoints if len(one) != 2 or any(length % side or length < side for length in one)]:
        raise ValueError(f"image_grid_pinpoints={uneven} cannot be split into squares of vision_config.image_size={side} px")
    return [[length // side for length in one] for one in pinpoints]


LAYOUT = LlavaNext()
