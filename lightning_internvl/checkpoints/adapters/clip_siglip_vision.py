"""The tower of CLIP or SigLIP alone, as transformers' `CLIPVisionModel` and `SiglipVisionModel` read it."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.clip import (
    SIGLIP_VISION,
    VISION,
    clip_tower,
    clip_tower_config,
    siglip_tower,
    siglip_tower_config,
    vision_rules,
)
from lightning_internvl.checkpoints.name_rules import NameRule
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.model.vlm import VLM

NAME = "a tower of CLIP or SigLIP of transformers (model_type 'clip_vision_model' or 'siglip_vision_model')"
NATIVE = True
SINGLE_FILE = False

ARCHITECTURES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
DEFAULTS = {"clip_vision_model": VISION, "siglip_vision_model": SIGLIP_VISION}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout; one with a projection or a classifier behind the tower is another."""
    ours = {f"{name}.weight" for name in ("visual_projection", "classifier")}
    return config.get("model_type") in ARCHITECTURES and ours.isdisjoint(shapes)


def canonical(name: str) -> str | None:
    """Older releases put the tower one level deeper, and stored position ids."""
    return None if name.endswith("position_ids") else name.removeprefix("vision_model.")


def rules(config: Config) -> list[NameRule]:
    """Names are those of transformers."""
    return vision_rules("")


def build(config: Config, shapes: Shapes) -> VLM:
    """A model that is a tower and nothing else.

    Raises:
        ValueError: for a setting that the tower does not have.
    """
    return VLM(clip_tower(config) if config["model_type"] == "clip_vision_model" else siglip_tower(config))


def config_of(model: VLM) -> Config | None:
    """The config of a tower that stands alone."""
    encoder = model.encoder
    if not isinstance(encoder, CLIPViT) or model.middleware is not None or model.decoder is not None:
        return None
    made = siglip_tower_config(encoder) if isinstance(encoder, SiglipViT) else clip_tower_config(encoder)
    if made is None:
        return None
    loaded, kind = model.config or {}, made["model_type"]
    if loaded.get("model_type") == kind:
        return updated(loaded, DEFAULTS[kind], made)
    return {"architectures": [ARCHITECTURES[kind]], **made}
