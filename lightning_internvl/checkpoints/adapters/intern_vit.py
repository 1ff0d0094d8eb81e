"""InternViT alone, in the layout of its releases with a config.json (InternViT-6B-224px, -448px-V1-x, InternViT-300M)."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.intern_vit import DEFAULTS, release_rules, tower, tower_config
from lightning_internvl.checkpoints.name_rules import NameRule
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.model.vlm import VLM

NAME = "InternViT (model_type 'intern_vit_6b')"
NATIVE = SINGLE_FILE = False


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") == "intern_vit_6b"


def canonical(name: str) -> str | None:
    """Every tensor is a weight."""
    return name


def rules(config: Config) -> list[NameRule]:
    """Names are ours."""
    return release_rules("")


def build(config: Config, shapes: Shapes) -> VLM:
    """A model that is a tower and nothing else."""
    return VLM(tower(config))


def config_of(model: VLM) -> Config | None:
    """The config of a tower that stands alone."""
    if not isinstance(model.encoder, InternViT) or model.middleware is not None or model.decoder is not None:
        return None
    if (made := tower_config(model.encoder)) is None:
        return None
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, DEFAULTS, made)
    return {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", **made}
