"""BLIP-2 after its first stage as LAVIS names it (`Blip2Qformer`): tower, Q-Former with text and language head, the three heads.

A folder's `config.json` holds the fields of LAVIS's constructor and of its BERT under one roof. A bare .pth file, as released, is
read too; what its shapes do not tell is taken from the published model (heads of 64 in the Q-Former, of 88 in the tower).
"""

from __future__ import annotations

import re

from torch import Tensor

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.qformer import (
    hf_tower,
    hf_tower_config,
    lavis_qformer_rules,
    lavis_tower_rules,
    qformer_config,
    qformer_of,
)
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.encoders.features import Features
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITM, NextToken, QueryITC

NAME = "BLIP-2 stage 1 of LAVIS (model_type 'blip2_qformer', or a bare .pth file)"
NATIVE = SINGLE_FILE = False

SMOOTHING = 0.1  # of ITC and ITG, written into the original's code
TOP: Config = {"num_query_token": 32, "embed_dim": 256, "cross_attention_freq": 2, "ln_vision_eps": 1e-5}
HEAD_WIDTH, TOWER_HEAD_WIDTH = 64, 88
_WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
_CLS = "Qformer.cls.predictions."
_TOWER = "visual_encoder."


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a config, or the names of a bare file, are of this layout."""
    return config.get("model_type") == "blip2_qformer" or (not config and {_WORDS, "itm_head.weight", "temp"} <= shapes.keys())


def canonical(name: str) -> str | None:
    """Position numbers that BERT stored are no weights."""
    return None if name.endswith(".position_ids") else name


def rules(config: Config) -> list[NameRule]:
    """Tower, Q-Former and heads; tables that the original ties stand in its files twice."""
    ours = "middleware.qformer"
    return [
        *lavis_qformer_rules(),
        NameRule((f"{ours}.embeddings.words.weight",), (_WORDS, f"{_CLS}decoder.weight"), _same, _twice),
        NameRule((f"{ours}.head.bias",), (f"{_CLS}bias", f"{_CLS}decoder.bias"), _same, _twice),
        rename(f"{ours}.head.dense.*", f"{_CLS}transform.dense.*"),
        rename(f"{ours}.head.norm.*", f"{_CLS}transform.LayerNorm.*"),
        rename("middleware.vision_proj.*", "vision_proj.*"),
        rename("middleware.text_proj.*", "text_proj.*"),
        rename("objectives.itm.itm_head.*", "itm_head.*"),
        rename("objectives.itc.temp", "temp"),
        *lavis_tower_rules(_TOWER),
    ]


def _same(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    if not first.is_meta and not first.equal(second):
        raise ValueError(f"{_CLS}decoder is not tied to its twin in this file; an untied language head is not supported")
    return (first,)


def _twice(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.clone()


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config; where the files hold no tower, it takes visual tokens in the place of pixels."""
    top = TOP | (config or config_from_shapes(shapes))
    if any(name.startswith(_TOWER) for name in shapes):
        vision = top.get("vision_config") or tower_from_shapes(shapes)
        encoder = hf_tower(vision, k_bias=bool(vision.get("k_bias")))
    else:
        encoder = Features(dim=top["vision_width"])
    q = top | {"cross_attention_frequency": top["cross_attention_freq"]}
    middleware = qformer_of(
        q, encoder.dim, num_queries=top["num_query_token"], vision_norm_eps=top["ln_vision_eps"],
        text="write", embed_dim=top["embed_dim"],
    )  # fmt: skip
    objectives = {
        "itc": QueryITC(min_temp=0.0, label_smoothing=SMOOTHING, gather_gradient=False),
        "itm": ITM(dim=middleware.dim),
        "itg": NextToken(label_smoothing=SMOOTHING),
    }
    return VLM(encoder, middleware, objectives=objectives)


def config_from_shapes(shapes: Shapes) -> Config:
    """The config of a bare file."""
    layers = {int(m[1]) for name in shapes if (m := re.match(r"Qformer\.bert\.encoder\.layer\.(\d+)\.", name))}
    crossed = sorted(n for n in layers if f"Qformer.bert.encoder.layer.{n}.crossattention.self.key.weight" in shapes)
    vocab, dim = shapes[_WORDS]
    return {
        "hidden_size": dim,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, dim // HEAD_WIDTH),
        "intermediate_size": shapes["Qformer.bert.encoder.layer.0.intermediate.dense.weight"][0],
        "cross_attention_freq": crossed[1] - crossed[0] if len(crossed) > 1 else len(layers),
        "vocab_size": vocab,
        "max_position_embeddings": shapes["Qformer.bert.embeddings.position_embeddings.weight"][0],
        "num_query_token": shapes["query_tokens"][1],
        "embed_dim": shapes["vision_proj.weight"][0],
        "vision_width": shapes["ln_vision.weight"][0],
    }


def tower_from_shapes(shapes: Shapes, prefix: str = _TOWER) -> Config:
    """The `vision_config` of a tower without one."""
    dim, _, patch, _ = shapes[f"{prefix}patch_embed.proj.weight"]
    blocks = {m[1] for name in shapes if (m := re.match(re.escape(prefix) + r"blocks\.(\d+)\.", name))}
    return {
        "hidden_size": dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, dim // TOWER_HEAD_WIDTH),
        "intermediate_size": shapes[f"{prefix}blocks.0.mlp.fc1.weight"][0],
        "patch_size": patch,
        "image_size": patch * round((shapes[f"{prefix}pos_embed"][1] - 1) ** 0.5),
        "qkv_bias": f"{prefix}blocks.0.attn.q_bias" in shapes,
    }


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, middleware = model.encoder, model.middleware
    if not isinstance(middleware, QFormer) or middleware.text != "write" or middleware.embed_dim is None:
        return None
    if model.decoder is not None or not {"itc", "itm"} <= set(model.objectives) or not hasattr(middleware.ln_vision, "eps"):
        return None
    made = qformer_config(middleware) | {
        "num_query_token": middleware.num_queries,
        "cross_attention_freq": middleware.cross_every,
        "embed_dim": middleware.embed_dim,
        "vision_width": encoder.dim,
        "ln_vision_eps": middleware.ln_vision.eps,
    }
    del made["cross_attention_frequency"]
    if isinstance(encoder, EvaViT):
        k_bias = encoder.blocks[0].attn.k_bias is not None
        made["vision_config"] = hf_tower_config(encoder, "eva_vit") | ({"k_bias": True} if k_bias else {})
    elif not isinstance(encoder, Features):
        return None
    loaded = model.config or {}
    if loaded.get("model_type") == "blip2_qformer":
        return updated(loaded, TOP | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}, made)
    return {"model_type": "blip2_qformer", **made}
