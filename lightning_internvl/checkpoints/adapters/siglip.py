"""SigLIP as transformers' `SiglipModel` reads it."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters.layout import Layout, updated_config
from lightning_internvl.checkpoints.families.clip import (
    SIGLIP_TEXT,
    SIGLIP_VISION,
    siglip_tower,
    siglip_tower_config,
    text_config,
    text_settings,
    vision_rules,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import SigLIP


class SiglipRelease(Layout):
    NAME = "SigLIP of transformers (model_type 'siglip')"
    MODEL_TYPES = ("siglip",)
    ARCHITECTURE = "SiglipModel"
    NATIVE = True

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *vision_rules("vision_model."),
            rename("middleware.text_projection.*", "text_model.head.*"),
            rename("middleware.text_model.**", "text_model.**"),
            *(rename(f"objectives.itc.{name}", name) for name in ("logit_scale", "logit_bias")),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        encoder = siglip_tower(config.get("vision_config") or {})
        text = SIGLIP_TEXT | (config.get("text_config") or {})
        width = text.get("projection_size") or text["hidden_size"]
        if not encoder.use_head:
            fault = "vision_config.vision_use_head=False is not supported in a model that compares"
            raise ValueError(f"{fault}; it must be True")
        middleware = CLIPText(
            encoder_dim=encoder.dim,
            embed_dim=width,
            **text_settings(text),
            pooling="last",
            causal=False,
            project_images=False,
            text_bias=True,
        )
        return VLM(encoder, middleware, objectives={"itc": SigLIP()})

    def fields_of(self, model: VLM) -> Config | None:
        encoder, middleware = model.encoder, model.middleware
        contrast = dict(model.objectives.items())
        if not (isinstance(encoder, SiglipViT) and isinstance(middleware, CLIPText)):
            return None
        if not encoder.use_head or not _reads_as_siglip(middleware) or model.decoder is not None:
            return None
        if set(contrast) != {"itc"} or not isinstance(contrast["itc"], SigLIP):
            return None
        text = {"model_type": "siglip_text_model", **text_config(middleware)}
        text["projection_size"] = middleware.embed_dim
        return {"text_config": text, "vision_config": siglip_tower_config(encoder)}

    def update(self, loaded: Config, fields: Config) -> Config:
        text = SIGLIP_TEXT | (loaded.get("text_config") or {})
        defaults = SIGLIP_TEXT | {"projection_size": text["hidden_size"]}
        return updated_config(loaded, {"text_config": defaults, "vision_config": SIGLIP_VISION}, fields)


def _reads_as_siglip(middleware: CLIPText) -> bool:
    return (
        not middleware.causal
        and middleware.pooling == "last"
        and middleware.visual_projection is None
        and middleware.text_projection.bias is not None
    )


LAYOUT = SiglipRelease()
