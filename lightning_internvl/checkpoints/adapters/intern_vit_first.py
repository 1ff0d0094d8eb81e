"""intern_vit_6b_*.pth: the tower in one bare file; a pooling head that came with it is left aside."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes
from lightning_internvl.checkpoints.adapters.internvl_c import release_shapes
from lightning_internvl.checkpoints.families.intern_vit import config_from_shapes, first_rules, tower, tower_config
from lightning_internvl.checkpoints.name_rules import NameRule
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.model.vlm import VLM

NAME = "InternViT (a bare .pth with `blocks.*`; heads from a config.json beside it, else as published)"
NATIVE = False
SINGLE_FILE = True


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether the names are those of the file."""
    return "patch_embed.proj.weight" in shapes and not any(name.startswith("transformer.") for name in shapes)


def canonical(name: str) -> str | None:
    """The pooling head is no part of the tower."""
    return None if name.startswith("clip_projector.") else name


def rules(config: Config) -> list[NameRule]:
    """The first names of the tower."""
    return first_rules()


def build(config: Config, shapes: Shapes) -> VLM:
    """A model that is a tower and nothing else."""
    return VLM(tower(config_from_shapes(release_shapes(shapes)) | config.get("vision_config", config)))


def config_of(model: VLM) -> Config | None:
    """An empty config for a tower that stands alone."""
    alone = isinstance(model.encoder, InternViT) and model.middleware is None and model.decoder is None
    return {} if alone and tower_config(model.encoder) is not None else None
