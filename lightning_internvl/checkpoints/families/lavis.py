"""The tower of LAVIS and its descendants (MiniGPT-4, XComposer 1), which files may lack."""

from __future__ import annotations

import re

from torch import nn

from lightning_internvl.checkpoints.families.qformer import QFORMER, VISION, hf_tower, hf_tower_config
from lightning_internvl.checkpoints.name_rules import Config, Shapes
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.encoders.features import Features

TOWER = "visual_encoder."
HEAD_WIDTH = 88  # of the tower
NORM_EPS = 1e-5  # of ln_vision
# What configs may leave out.
DEFAULTS: Config = {"bert_config": QFORMER, "vision_config": VISION | {"model_type": "eva_vit"}}


def lavis_encoder(config: Config, shapes: Shapes, width: int | None) -> EvaViT | Features:
    """The tower in the files, by `vision_config` or shapes; without one features of `width`."""
    if not any(name.startswith(TOWER) for name in shapes):
        if width is None:
            raise ValueError("config.json has no vision_width, and the files hold no tower")
        return Features(dim=width)
    vision = config.get("vision_config") or tower_from_shapes(shapes)
    return hf_tower(vision, k_bias=bool(vision.get("k_bias")))


def tower_from_shapes(shapes: Shapes) -> Config:
    """The `vision_config` of a tower without one."""
    dim, _, patch, _ = shapes[f"{TOWER}patch_embed.proj.weight"]
    block = re.compile(rf"{re.escape(TOWER)}blocks\.(\d+)\.")
    blocks = {found[1] for found in map(block.match, shapes) if found}
    return {
        "hidden_size": dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, dim // HEAD_WIDTH),
        "intermediate_size": shapes[f"{TOWER}blocks.0.mlp.fc1.weight"][0],
        "patch_size": patch,
        "image_size": patch * round((shapes[f"{TOWER}pos_embed"][1] - 1) ** 0.5),
        "qkv_bias": f"{TOWER}blocks.0.attn.q_bias" in shapes,
    }


def lavis_encoder_config(encoder: nn.Module, *, with_k_bias: bool = False) -> Config | None:
    """What a config says of an encoder; None for one that the layouts cannot hold.

    Args:
        with_k_bias: whether the layout can hold a tower whose keys have a bias.
    """
    if isinstance(encoder, Features):
        return {"vision_width": encoder.dim}
    if not isinstance(encoder, EvaViT):
        return None
    vision = hf_tower_config(encoder, "eva_vit")
    if encoder.blocks[0].attn.k_bias is not None:
        if not with_k_bias:
            return None
        vision["k_bias"] = True
    return {"vision_width": encoder.dim, "vision_config": vision}
