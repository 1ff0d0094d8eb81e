"""InternVL-14B-224px and its fine-tunes: InternViT, QLLaMA and the heads of stages 1 and 2 (`internvl_stage2`)."""

from __future__ import annotations

import math

from lightning_internvl.checkpoints.adapters import Config, renamed
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.layers import RMSNorm
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model import VLM
from lightning_internvl.objectives import ITC, ITM, NextToken

NAME = "InternVL-14B (InternViT + QLLaMA; model_type 'internvl' with a qllama_config)"
IGNORED = ("qllama.model.layers.*.self_attn.rotary_emb.inv_freq",)
SCALARS = frozenset({"logit_scale"})

# The official class builds its rotary table from this constant; `rope_theta` of the config is not read.
ROPE_THETA = 10000.0

# Official part, our part; a name that ends in a dot stands for everything below it.
NAMES = (
    ("vision_model.", "encoder."),
    ("qllama.", "middleware.qllama."),
    ("query_tokens", "middleware.query_tokens"),
    ("text_projection", "middleware.text_projection"),
    ("clip_projector.", "middleware.clip_projector."),
    ("clip_projector2.", "middleware.clip_projector2."),
    ("logit_scale", "objectives.itc.logit_scale"),
    ("itm_head.", "objectives.itm.itm_head."),
)

# What a config may leave out, and the fields of which the parts know one value only.
_TOP = {
    "clip_embed_dim": 768, "attn_pool_num_heads": 16, "num_query_token": 96, "label_smoothing": 0.0,
    "cross_attention_frequency": 2, "use_backbone_lora": 0, "use_qllama_lora": 0, "force_image_size": None,
}  # fmt: skip
_VISION = {
    "hidden_size": 3200, "num_hidden_layers": 48, "num_attention_heads": 25, "intermediate_size": 12800,
    "image_size": 224, "patch_size": 14, "qk_normalization": True, "qkv_bias": False, "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6, "drop_path_rate": 0.0, "initializer_factor": 0.1,
}  # fmt: skip
_QLLAMA = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
    "vocab_size": 32000, "rms_norm_eps": 1e-6,
}  # fmt: skip
_ONLY = {
    "vision_config": {"hidden_act": "gelu", "dropout": 0.0, "attention_dropout": 0.0},
    "qllama_config": {"hidden_act": "silu", "tie_word_embeddings": False},
}


def recognises(config: Config) -> bool:
    """Whether a `config.json` is of this layout; Transformers gives that model_type to later models too."""
    return config.get("model_type") == "internvl" and "qllama_config" in config


def to_ours(name: str) -> str | None:
    """Our name of an official tensor, None if the layout has no such tensor."""
    return renamed(name, NAMES)


def to_official(name: str) -> str | None:
    """The official name of one of our tensors, None if the layout has no place for it."""
    return renamed(name, ((ours, official) for official, ours in NAMES))


def build(config: Config, names: set[str]) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for LoRA weights that were not merged, or a setting that the parts do not have.
    """
    top, vision, qllama = _TOP | config, _VISION | config.get("vision_config", {}), _QLLAMA | config["qllama_config"]
    if top["use_backbone_lora"] or top["use_qllama_lora"] or any(".lora_" in name for name in names):
        raise ValueError("this InternVL checkpoint holds LoRA weights, which must be merged and use_*_lora set to 0 first")
    for section, fields in _ONLY.items():
        for field, known in fields.items():
            if (value := config.get(section, {}).get(field, known)) != known:
                raise ValueError(f"{section}.{field}={value!r} is not supported; it must be {known!r}")
    objectives = {
        # The original does not bound the scale.
        "itc": ITC(max_scale=math.inf, label_smoothing=top["label_smoothing"]),
        "itm": ITM(dim=qllama["hidden_size"]),
        "itg": NextToken(),
    }
    return VLM(_encoder(vision, top["force_image_size"]), _middleware(top, vision, qllama), objectives=objectives)


def _encoder(vision: Config, force_image_size: int | None) -> InternViT:
    return InternViT(
        image_size=force_image_size or vision["image_size"],
        patch_size=vision["patch_size"],
        dim=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_dim=vision["intermediate_size"],
        qk_norm=vision["qk_normalization"],
        qkv_bias=vision["qkv_bias"],
        norm=vision["norm_type"],
        norm_eps=vision["layer_norm_eps"],
        layer_scale=vision["initializer_factor"],
        drop_path=vision["drop_path_rate"],
    )


def _middleware(top: Config, vision: Config, qllama: Config) -> QLLaMA:
    return QLLaMA(
        encoder_dim=vision["hidden_size"],
        vocab_size=qllama["vocab_size"],
        dim=qllama["hidden_size"],
        depth=qllama["num_hidden_layers"],
        heads=qllama["num_attention_heads"],
        mlp_dim=qllama["intermediate_size"],
        num_queries=top["num_query_token"],
        embed_dim=top["clip_embed_dim"],
        pool_heads=top["attn_pool_num_heads"],
        cross_every=top["cross_attention_frequency"],
        rope_theta=ROPE_THETA,
        norm_eps=qllama["rms_norm_eps"],
    )


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, else one made from its parts; None if the layout cannot hold it."""
    encoder, middleware = model.encoder, model.middleware
    if not (isinstance(encoder, InternViT) and isinstance(middleware, QLLaMA)) or model.decoder is not None:
        return None
    if not {"itc", "itm"} <= set(model.objectives) or middleware.rope_theta != ROPE_THETA:
        return None
    if model.config is not None and recognises(model.config):
        return model.config
    layers = middleware.qllama.model.layers
    crossing = [i for i, layer in enumerate(layers) if layer.cross_attn is not None]
    return {
        "architectures": ["InternVLModel"],
        "model_type": "internvl",
        "clip_embed_dim": middleware.embed_dim,
        "attn_pool_num_heads": middleware.clip_projector.cross_attn.heads,
        "num_query_token": middleware.num_queries,
        "label_smoothing": model.objectives["itc"].label_smoothing,
        "cross_attention_frequency": crossing[1] if len(crossing) > 1 else len(layers),
        "vision_config": _vision_config(encoder),
        "qllama_config": _qllama_config(middleware),
    }


def _vision_config(encoder: InternViT) -> Config:
    blocks = encoder.encoder.layers
    return {
        "hidden_size": encoder.dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": blocks[0].attn.heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "qk_normalization": isinstance(blocks[0].attn.q_norm, RMSNorm),
        "qkv_bias": blocks[0].attn.qkv.bias is not None,
        "norm_type": "rms_norm" if isinstance(blocks[0].norm1, RMSNorm) else "layer_norm",
        "layer_norm_eps": blocks[0].norm1.eps,
        "drop_path_rate": blocks[-1].drop_path.rate,
    }


def _qllama_config(middleware: QLLaMA) -> Config:
    lm = middleware.qllama
    return {
        "model_type": "llama",
        "hidden_size": middleware.dim,
        "num_hidden_layers": len(lm.model.layers),
        "num_attention_heads": middleware.dim // middleware.head_dim,
        "intermediate_size": lm.model.layers[0].mlp.gate_proj.out_features,
        "vocab_size": lm.lm_head.out_features,
        "rms_norm_eps": lm.model.norm.eps,
        "tie_word_embeddings": False,
    }
