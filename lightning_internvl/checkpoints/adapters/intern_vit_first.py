"""intern_vit_6b_*.pth: the tower in one bare file, without its pooling head."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters.internvl_c import release_shapes
from lightning_internvl.checkpoints.adapters.layout import BESIDE, BareFileLayout
from lightning_internvl.checkpoints.families.intern_vit import config_from_shapes, first_rules, tower, tower_config
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.model.vlm import VLM


class InternViTFirst(BareFileLayout):
    NAME = f"InternViT (a bare .pth with `blocks.*`; heads {BESIDE}, else as published)"

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        text = any(name.startswith("transformer.") for name in shapes)
        return "patch_embed.proj.weight" in shapes and not text

    def canonical(self, name: str) -> str | None:
        """The pooling head is no part of the tower."""
        return None if name.startswith("clip_projector.") else name

    def rules(self, config: Config) -> list[NameRule]:
        return first_rules()

    def build(self, config: Config, shapes: Shapes) -> VLM:
        vision = config_from_shapes(release_shapes(shapes))
        return VLM(tower(vision | config.get("vision_config", config)))

    def holds(self, model: VLM) -> bool:
        alone = model.middleware is None and model.decoder is None
        fits = isinstance(model.encoder, InternViT) and tower_config(model.encoder) is not None
        return alone and fits


LAYOUT = InternViTFirst()
