"""The tower of LAVIS's descendants (MiniGPT-4, XComposer 1), whose checkpoints may come without it."""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters import Config, Shapes
from lightning_internvl.checkpoints.adapters.blip2_lavis import tower_from_shapes
from lightning_internvl.checkpoints.families.qformer import QFORMER, VISION, hf_tower, hf_tower_config
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.encoders.features import Features

TOWER = "visual_encoder."
NORM_EPS = 1e-5  # of ln_vision
# What configs may leave out.
DEFAULTS: Config = {"bert_config": QFORMER, "vision_config": VISION | {"model_type": "eva_vit"}}


def lavis_encoder(config: Config, shapes: Shapes, width: int) -> EvaViT | Features:
    """The tower that the files hold, by `vision_config` or their shapes; features of `width` where they hold none."""
    if not any(name.startswith(TOWER) for name in shapes):
        return Features(dim=width)
    return hf_tower(config.get("vision_config") or tower_from_shapes(shapes, TOWER), k_bias=False)


def lavis_encoder_config(encoder: nn.Module) -> Config | None:
    """What a config says of an encoder; None for one that the layouts cannot hold."""
    if isinstance(encoder, Features):
        return {"vision_width": encoder.dim}
    if isinstance(encoder, EvaViT) and encoder.blocks[0].attn.k_bias is None:
        return {"vision_width": encoder.dim, "vision_config": hf_tower_config(encoder, "eva_vit")}
    return None
