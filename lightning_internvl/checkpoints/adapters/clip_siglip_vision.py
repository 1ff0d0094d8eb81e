"""The tower of CLIP or SigLIP alone, as transformers' classes of vision models read it."""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters.layout import EncoderLayout, updated_config
from lightning_internvl.checkpoints.families.clip import (
    SIGLIP_VISION,
    VISION,
    clip_tower,
    clip_tower_config,
    siglip_tower,
    siglip_tower_config,
    vision_rules,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.model.vlm import VLM

ARCHITECTURES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
DEFAULTS = {"clip_vision_model": VISION, "siglip_vision_model": SIGLIP_VISION}


class CLIPSiglipVision(EncoderLayout):
    NAME = "a tower of CLIP or SigLIP of transformers (model_type 'clip_vision_model' or 'siglip_vision_model')"
    NATIVE = True
    MODEL_TYPES = tuple(ARCHITECTURES)

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """One with a projection or a classifier behind the tower is another."""
        behind = {"visual_projection.weight", "classifier.weight"}
        return super().recognises(config, shapes) and behind.isdisjoint(shapes)

    def canonical(self, name: str) -> str | None:
        """Older releases put the tower one level deeper."""
        return super().canonical(name.removeprefix("vision_model."))

    def published(self, name: str) -> str:
        return f"vision_model.{name}"

    def rules(self, config: Config) -> list[NameRule]:
        return vision_rules("")

    def encoder(self, config: Config) -> CLIPViT:
        is_clip = config["model_type"] == "clip_vision_model"
        return clip_tower(config) if is_clip else siglip_tower(config)

    def encoder_config(self, encoder: nn.Module) -> Config | None:
        if isinstance(encoder, SiglipViT):
            return siglip_tower_config(encoder)
        return clip_tower_config(encoder) if isinstance(encoder, CLIPViT) else None

    def is_config_of(self, loaded: Config, fields: Config) -> bool:
        return loaded.get("model_type") == fields["model_type"]

    def update(self, loaded: Config, fields: Config) -> Config:
        return updated_config(loaded, DEFAULTS[fields["model_type"]], fields)

    def new_config(self, model: VLM, fields: Config) -> Config:
        return {"architectures": [ARCHITECTURES[fields["model_type"]]], **fields}


LAYOUT = CLIPSiglipVision()
