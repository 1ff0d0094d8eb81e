"""InternViT alone, as transformers' `InternVLVisionModel` reads it."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.intern_vit import NATIVE_DEFAULTS, native_rules, native_tower, native_tower_config
from lightning_internvl.checkpoints.name_rules import NameRule
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.model.vlm import VLM

NAME = "InternViT of transformers (model_type 'internvl_vision')"
NATIVE = True
SINGLE_FILE = False


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") == "internvl_vision"


def canonical(name: str) -> str | None:
    """Every tensor is a weight."""
    return name


def rules(config: Config) -> list[NameRule]:
    """The names of transformers."""
    return native_rules("")


def build(config: Config, shapes: Shapes) -> VLM:
    """A model that is a tower and nothing else."""
    return VLM(native_tower(config))


def config_of(model: VLM) -> Config | None:
    """The config of a tower that stands alone."""
    if not isinstance(model.encoder, InternViT) or model.middleware is not None or model.decoder is not None:
        return None
    if (made := native_tower_config(model.encoder)) is None:
        return None
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, NATIVE_DEFAULTS, made)
    return {"architectures": ["InternVLVisionModel"], **made}
