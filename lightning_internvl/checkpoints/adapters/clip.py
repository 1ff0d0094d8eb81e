"""CLIP as transformers' `CLIPModel` reads it."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
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
from lightning_internvl.checkpoints.name_rules import NameRule, rename, scalar
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC

NAME = "CLIP of transformers (model_type 'clip')"
NATIVE = True
SINGLE_FILE = False

TOP: Config = {"projection_dim": 512}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout; one may also stand beside a state dict under OpenAI's names."""
    return config.get("model_type") == "clip" and "visual.conv1.weight" not in shapes


def canonical(name: str) -> str | None:
    """Tables of positions that older releases stored are no weights."""
    return None if name.endswith(".position_ids") else name


def rules(config: Config) -> list[NameRule]:
    """Both towers, both projections and the scale."""
    names = ("text_model.**", "text_projection.*", "visual_projection.*")
    return [
        *vision_rules("vision_model."),
        *(rename(f"middleware.{name}", name) for name in names),
        scalar("objectives.itc.logit_scale", "logit_scale"),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    encoder = clip_tower(config.get("vision_config") or {})
    middleware = clip_text(config.get("text_config") or {}, encoder.dim, (TOP | config)["projection_dim"])
    return VLM(encoder, middleware, objectives={"itc": ITC()})


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, middleware = model.encoder, model.middleware
    if not (isinstance(encoder, CLIPViT) and holds(middleware)) or model.decoder is not None or set(model.objectives) != {"itc"}:
        return None
    # transformers reads an end token 2 as "the largest id", whatever was meant.
    sound = middleware.pooling == "argmax" or middleware.eos_token_id != OLD_EOS
    if (vision := clip_tower_config(encoder)) is None or encoder.post_norm != "cls" or not sound:
        return None
    eos = OLD_EOS if middleware.pooling == "argmax" else middleware.eos_token_id
    shared = {"projection_dim": middleware.embed_dim}
    made = {
        **shared,
        "text_config": {"model_type": "clip_text_model", **text_config(middleware), **shared, "eos_token_id": eos},
        "vision_config": vision | shared,
    }
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, TOP | {"text_config": TEXT, "vision_config": VISION}, made)
    return {"architectures": ["CLIPModel"], "model_type": "clip", **made}


def holds(middleware: object) -> bool:
    """Whether a middleware is CLIP's: causal texts, projections of both sides without biases."""
    return (
        isinstance(middleware, CLIPText)
        and middleware.causal
        and middleware.pooling in ("eos", "argmax")
        and middleware.visual_projection is not None
        and middleware.text_projection.bias is None
    )
