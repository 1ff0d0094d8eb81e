"""SigLIP as transformers' `SiglipModel` reads it."""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.clip import (
    SIGLIP_TEXT,
    SIGLIP_VISION,
    siglip_tower,
    siglip_tower_config,
    text_config,
    text_settings,
    vision_rules,
)
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import SigLIP

NAME = "SigLIP of transformers (model_type 'siglip')"
NATIVE = True
SINGLE_FILE = False


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") == "siglip"


def canonical(name: str) -> str | None:
    """Tables of positions that older releases stored are no weights."""
    return None if name.endswith(".position_ids") else name


def rules(config: Config) -> list[NameRule]:
    """Both towers, the projection of texts, scale and bias."""
    return [
        *vision_rules("vision_model."),
        rename("middleware.text_projection.*", "text_model.head.*"),
        rename("middleware.text_model.**", "text_model.**"),
        *(rename(f"objectives.itc.{name}", name) for name in ("logit_scale", "logit_bias")),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have, or a tower without a pooling head.
    """
    encoder = siglip_tower(config.get("vision_config") or {})
    text = SIGLIP_TEXT | (config.get("text_config") or {})
    width = text.get("projection_size") or text["hidden_size"]
    if not encoder.use_head:
        raise ValueError("vision_config.vision_use_head=False is not supported in a model that compares; it must be True")
    middleware = CLIPText(
        encoder_dim=encoder.dim, embed_dim=width, **text_settings(text), pooling="last", causal=False, project_images=False,
        text_bias=True,
    )  # fmt: skip
    return VLM(encoder, middleware, objectives={"itc": SigLIP()})


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, middleware, contrast = model.encoder, model.middleware, dict(model.objectives.items())
    fits = isinstance(encoder, SiglipViT) and encoder.use_head and _holds(middleware) and model.decoder is None
    if not fits or set(contrast) != {"itc"} or not isinstance(contrast["itc"], SigLIP):
        return None
    text = {"model_type": "siglip_text_model", **text_config(middleware), "projection_size": middleware.embed_dim}
    made = {"text_config": text, "vision_config": siglip_tower_config(encoder)}
    loaded = model.config or {}
    if recognises(loaded, {}):
        width = (loaded.get("text_config") or {}).get("hidden_size", SIGLIP_TEXT["hidden_size"])
        defaults = {"text_config": SIGLIP_TEXT | {"projection_size": width}, "vision_config": SIGLIP_VISION}
        return updated(loaded, defaults, made)
    return {"architectures": ["SiglipModel"], "model_type": "siglip", **made}


def _holds(middleware: nn.Module | None) -> bool:
    return (
        isinstance(middleware, CLIPText)
        and not middleware.causal
        and middleware.pooling == "last"
        and middleware.visual_projection is None
        and middleware.text_projection.bias is not None
    )
