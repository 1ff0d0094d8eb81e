"""InternViT alone, in the layout of its releases with a config.json (InternViT-6B-224px,
-448px-V1-x, InternViT-300M)."""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters.layout import EncoderLayout
from lightning_internvl.checkpoints.families.intern_vit import DEFAULTS, release_rules, tower, tower_config
from lightning_internvl.checkpoints.name_rules import Config, NameRule
from lightning_internvl.encoders.intern_vit import InternViT


class InternViTRelease(EncoderLayout):
    NAME = "InternViT (model_type 'intern_vit_6b')"
    MODEL_TYPES = ("intern_vit_6b",)
    ARCHITECTURE = "InternVisionModel"
    DEFAULTS = DEFAULTS

    def rules(self, config: Config) -> list[NameRule]:
        return release_rules("")

    def encoder(self, config: Config) -> InternViT:
        return tower(config)

    def encoder_config(self, encoder: nn.Module) -> Config | None:
        return tower_config(encoder) if isinstance(encoder, InternViT) else None


LAYOUT = InternViTRelease()
