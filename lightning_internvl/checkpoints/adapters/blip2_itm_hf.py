"""BLIP-2 for retrieval as transformers' `Blip2ForImageTextRetrieval` reads it: Q-Former with text, projections, matching head."""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.qformer import (
    QFORMER,
    VISION,
    hf_qformer_rules,
    hf_tower,
    hf_tower_config,
    hf_tower_rules,
    qformer_config,
    qformer_of,
)
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITM, QueryITC

NAME = "BLIP-2 retrieval of transformers (Blip2ForImageTextRetrieval)"
NATIVE = True
SINGLE_FILE = False

TOP: Config = {"num_query_tokens": 32, "image_text_hidden_size": 256, "image_token_index": None}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a config is of this class; without the name of a class, the matching head tells."""
    classes = config.get("architectures") or []
    mine = "Blip2ForImageTextRetrieval" in classes or (not classes and "itm_head.weight" in shapes)
    return config.get("model_type") == "blip-2" and mine


def canonical(name: str) -> str | None:
    """Position numbers that older releases stored are no weights."""
    return None if name.endswith(".position_ids") else name


def rules(config: Config) -> list[NameRule]:
    """Tower, Q-Former with its text embeddings beside it, heads."""
    return [
        *hf_tower_rules(),
        *hf_qformer_rules("embeddings", "qformer.layernorm"),
        rename("middleware.vision_proj.*", "vision_projection.*"),
        rename("middleware.text_proj.*", "text_projection.*"),
        rename("objectives.itm.itm_head.*", "itm_head.*"),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config. Similarities are plain cosines, for the layout holds no temperature.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    top, q = TOP | config, QFORMER | config.get("qformer_config", {})
    if not q["use_qformer_text_input"]:
        raise ValueError("qformer_config.use_qformer_text_input=False is not supported for retrieval; it must be True")
    vision = VISION | config.get("vision_config", {})
    encoder = hf_tower(vision)
    middleware = qformer_of(
        q, encoder.dim, num_queries=top["num_query_tokens"], vision_norm_eps=vision["layer_norm_eps"], text="read",
        embed_dim=top["image_text_hidden_size"], image_prefix=top["image_token_index"] is not None,
    )  # fmt: skip
    objectives = {"itc": QueryITC(init_temp=1.0, learnable=False), "itm": ITM(dim=middleware.dim)}
    return VLM(encoder, middleware, objectives=objectives)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, middleware = model.encoder, model.middleware
    if not (isinstance(encoder, EvaViT) and isinstance(middleware, QFormer)) or model.decoder is not None:
        return None
    temp = getattr(model.objectives["itc"], "temp", None) if "itc" in model.objectives else None
    if (
        middleware.text != "read"
        or middleware.embed_dim is None
        or "itm" not in model.objectives
        or isinstance(temp, nn.Parameter)
    ):
        return None
    if getattr(middleware.ln_vision, "eps", None) != encoder.blocks[0].norm1.eps:
        return None
    made = {
        "num_query_tokens": middleware.num_queries,
        "image_text_hidden_size": middleware.embed_dim,
        "vision_config": hf_tower_config(encoder, "blip_2_vision_model"),
        "qformer_config": qformer_config(middleware) | {"use_qformer_text_input": True, "encoder_hidden_size": encoder.dim},
    }
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, TOP | {"vision_config": VISION, "qformer_config": QFORMER}, made)
    made["qformer_config"]["model_type"] = "blip_2_qformer"
    return {"architectures": ["Blip2ForImageTextRetrieval"], "model_type": "blip-2", "image_token_index": None, **made}
