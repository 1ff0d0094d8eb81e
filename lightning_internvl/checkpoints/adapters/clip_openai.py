"""CLIP's state dict under the names of OpenAI and open_clip (`ViT-L-14.pt` as a plain state dict, `open_clip_pytorch_model.bin`).

OpenAI's own files are TorchScript programs, which are not opened here because they hold code; their state dict, saved alone, is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_internvl.checkpoints.adapters import Config, Shapes, clip as native
from lightning_internvl.checkpoints.families.clip import add_first_dimension, clip_text, clip_tower, clip_tower_config, transposed
from lightning_internvl.checkpoints.name_rules import NameRule, rename, scalar
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC

NAME = "CLIP (a bare state dict with `visual.transformer.*`; heads and activation from a config.json beside it, else OpenAI's)"
NATIVE = False
SINGLE_FILE = True

HEAD_DIM = 64  # of all that OpenAI released
NOTES = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # no weights
BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"} | {
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether the names are those of the file; of CLIP's models with a ResNet they are not."""
    return "visual.conv1.weight" in shapes and "visual.transformer.resblocks.0.ln_1.weight" in shapes


def canonical(name: str) -> str | None:
    """Sizes that the file states beside its weights are none."""
    return None if name in NOTES else name


def rules(config: Config) -> list[NameRule]:
    """Both towers; matrices that are multiplied from the left there, and query, key and value in one."""
    embeddings = "encoder.embeddings"
    return [
        add_first_dimension(f"{embeddings}.class_embedding", "visual.class_embedding", 2),
        add_first_dimension(f"{embeddings}.position_embedding", "visual.positional_embedding"),
        rename(f"{embeddings}.patch_embedding.weight", "visual.conv1.weight"),
        rename("encoder.pre_layrnorm.*", "visual.ln_pre.*"),
        rename("encoder.post_layernorm.*", "visual.ln_post.*"),
        *_block_rules("encoder.encoder.layers.*", "visual.transformer.resblocks.*"),
        rename("middleware.text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        rename("middleware.text_model.embeddings.position_embedding.weight", "positional_embedding"),
        rename("middleware.text_model.final_layer_norm.*", "ln_final.*"),
        *_block_rules("middleware.text_model.encoder.layers.*", "transformer.resblocks.*"),
        transposed("middleware.visual_projection.weight", "visual.proj"),
        transposed("middleware.text_projection.weight", "text_projection"),
        scalar("objectives.itc.logit_scale", "logit_scale"),
    ]


def _block_rules(ours: str, theirs: str) -> list[NameRule]:
    fused = (split_rows(f"{ours}.self_attn", f"{theirs}.attn.in_proj_{leaf}", leaf) for leaf in ("weight", "bias"))
    return [*fused, *(rename(f"{ours}.{own}.*", f"{theirs}.{name}.*") for own, name in BLOCK.items())]


def split_rows(ours: str, official: str, leaf: str) -> NameRule:
    """Query, key and value as blocks of rows of one tensor there."""

    def read(rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in rows.chunk(3))

    return NameRule(tuple(f"{ours}.{x}_proj.{leaf}" for x in "qkv"), (official,), read, lambda *parts: (torch.cat(parts),))


def build(config: Config, shapes: Shapes) -> VLM:
    """The model that the shapes describe; a config.json beside the file, as of transformers, tells heads and activation."""
    dim, _, patch, _ = shapes["visual.conv1.weight"]
    grid = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    vision = {**_size(shapes, "visual.transformer"), "patch_size": patch, "image_size": patch * grid}
    text = {**_size(shapes, "transformer"), "vocab_size": shapes["token_embedding.weight"][0]}
    text |= {"max_position_embeddings": shapes["positional_embedding"][0]}
    encoder = clip_tower(vision | config.get("vision_config", {}))
    largest = {"eos_token_id": 2}  # as transformers says "the largest id of the row"
    middleware = clip_text(text | config.get("text_config", {}) | largest, dim, shapes["text_projection"][1])
    return VLM(encoder, middleware, objectives={"itc": ITC()})


def _size(shapes: Shapes, tower: str) -> Config:
    hidden, width = shapes[f"{tower}.resblocks.0.mlp.c_fc.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": sum(name.startswith(f"{tower}.resblocks.") and name.endswith("ln_1.weight") for name in shapes),
        "num_attention_heads": max(1, width // HEAD_DIM),
    }


def config_of(model: VLM) -> Config | None:
    """An empty config where the layout can hold the model: heads, activation and end token (the largest id) as OpenAI has."""
    encoder, middleware = model.encoder, model.middleware
    if not (isinstance(encoder, CLIPViT) and native.holds(middleware)) or model.decoder is not None:
        return None
    if clip_tower_config(encoder) is None or encoder.post_norm != "cls" or set(model.objectives) != {"itc"}:
        return None
    blocks = encoder.encoder.layers[0], middleware.text_model.encoder.layers[0]
    usual = all(
        b.mlp.act == "quick_gelu" and b.layer_norm1.eps == 1e-5 and b.self_attn.heads == max(1, width // HEAD_DIM)
        for b, width in zip(blocks, (encoder.dim, middleware.dim), strict=True)
    )
    words = middleware.text_model.embeddings.token_embedding.num_embeddings
    return {} if usual and (middleware.pooling == "argmax" or middleware.eos_token_id == words - 1) else None
