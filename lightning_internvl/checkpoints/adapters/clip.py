"""CLIP as transformers' `CLIPModel` reads it."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.families.clip import (
    OLD_EOS,
    TEXT,
    VISION,
    clip_text,
    clip_tower,
    clip_tower_config,
    text_config,
    vision_rules,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename, scalar
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC

TOP: Config = {"projection_dim": 512}


class CLIP(Layout):
    NAME = "CLIP of transformers (model_type 'clip')"
    MODEL_TYPES = ("clip",)
    ARCHITECTURE = "CLIPModel"
    NATIVE = True
    DEFAULTS = TOP | {"text_config": TEXT, "vision_config": VISION}

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """The config may also stand beside a state dict under OpenAI's names."""
        return super().recognises(config, shapes) and "visual.conv1.weight" not in shapes

    def rules(self, config: Config) -> list[NameRule]:
        names = ("text_model.**", "text_projection.*", "visual_projection.*")
        return [
            *vision_rules("vision_model."),
            *(rename(f"middleware.{name}", name) for name in names),
            scalar("objectives.itc.logit_scale", "logit_scale"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        encoder = clip_tower(config.get("vision_config") or {})
        width = (TOP | config)["projection_dim"]
        middleware = clip_text(config.get("text_config") or {}, encoder.dim, width)
        return VLM(encoder, middleware, objectives={"itc": ITC()})

    def fields_of(self, model: VLM) -> Config | None:
        if (parts := clip_parts(model)) is None:
            return None
        encoder, middleware = parts
        argmax = middleware.pooling == "argmax"
        # transformers reads an end token 2 as "the largest id", whatever was meant.
        if not argmax and middleware.eos_token_id == OLD_EOS:
            return None
        width = {"projection_dim": middleware.embed_dim}
        text = {"model_type": "clip_text_model", **text_config(middleware), **width}
        text["eos_token_id"] = OLD_EOS if argmax else middleware.eos_token_id
        vision = clip_tower_config(encoder)
        return None if vision is None else {**width, "text_config": text, "vision_config": vision | width}


def clip_parts(model: VLM) -> tuple[CLIPViT, CLIPText] | None:
    """Tower and reader of texts of a model that is CLIP: causal texts, projections of both sides
    without biases, one contrastive objective; None for another."""
    encoder, middleware = model.encoder, model.middleware
    if not (isinstance(encoder, CLIPViT) and isinstance(middleware, CLIPText)):
        return None
    if model.decoder is not None or set(model.objectives) != {"itc"} or encoder.post_norm != "cls":
        return None
    reads = middleware.causal and middleware.pooling in ("eos", "argmax")
    picture = middleware.visual_projection
    projects = picture is not None and picture.bias is None and middleware.text_projection.bias is None
    return (encoder, middleware) if reads and projects else None


LAYOUT = CLIP()
