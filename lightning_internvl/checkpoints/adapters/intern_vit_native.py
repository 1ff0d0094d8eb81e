"""InternViT alone, as transformers' `InternVLVisionModel` reads it."""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters.layout import EncoderLayout
from lightning_internvl.checkpoints.families.intern_vit import (
    NATIVE_DEFAULTS,
    native_rules,
    native_tower,
    native_tower_config,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule
from lightning_internvl.encoders.intern_vit import InternViT


class InternViTNative(EncoderLayout):
    NAME = "InternViT of transformers (model_type 'internvl_vision')"
    MODEL_TYPES = ("internvl_vision",)
    ARCHITECTURE = "InternVLVisionModel"
    DEFAULTS = NATIVE_DEFAULTS
    NATIVE = True

    def rules(self, config: Config) -> list[NameRule]:
        return native_rules("")

    def encoder(self, config: Config) -> InternViT:
        return native_tower(config)

    def encoder_config(self, encoder: nn.Module) -> Config | None:
        return native_tower_config(encoder) if isinstance(encoder, InternViT) else None


LAYOUT = InternViTNative()
