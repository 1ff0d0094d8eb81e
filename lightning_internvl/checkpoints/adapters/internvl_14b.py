"""InternVL-14B-224px and its fine-tunes: InternViT, QLLaMA and the heads of stages 1 and 2
(`internvl_stage2`)."""

from __future__ import annotations

import math

from lightning_internvl.checkpoints.adapters.layout import HOLDS_LORA, Layout
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.intern_vit import DEFAULTS, release_rules, tower, tower_config
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename, scalar
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, ITM, NextToken

# The official class builds its rotary table from this constant; `rope_theta` of the config is not
# read.
ROPE_THETA = 10000.0

HEADS = ("qllama.**", "query_tokens", "text_projection", "clip_projector.**", "clip_projector2.**")
# What a config may leave out, and the fields of which the parts know one value only.
TOP: Config = {
    "clip_embed_dim": 768, "attn_pool_num_heads": 16, "num_query_token": 96, "label_smoothing": 0.0,
    "cross_attention_frequency": 2, "use_backbone_lora": 0, "use_qllama_lora": 0, "force_image_size": None,
}  # fmt: skip
LLAMA: Config = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
    "vocab_size": 32000, "rms_norm_eps": 1e-6, "model_type": "llama", "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_ONLY: Config = {"hidden_act": "silu", "tie_word_embeddings": False}


class InternVL14B(Layout):
    NAME = "InternVL-14B (InternViT + QLLaMA; model_type 'internvl' with a qllama_config)"
    MODEL_TYPES = ("internvl",)
    ARCHITECTURE = "InternVLModel"
    DEFAULTS = TOP | {"vision_config": DEFAULTS, "qllama_config": LLAMA}

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """transformers gives that model_type to later models too."""
        return super().recognises(config, shapes) and "qllama_config" in config

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *release_rules("vision_model."),
            *(rename(f"middleware.{name}", name) for name in HEADS),
            scalar("objectives.itc.logit_scale", "logit_scale"),
            rename("objectives.itm.itm_head.*", "itm_head.*"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top, vision, qllama = TOP | config, config.get("vision_config", {}), LLAMA | config["qllama_config"]
        adapted = top["use_backbone_lora"] or top["use_qllama_lora"]
        if adapted or any(".lora_" in name for name in shapes):
            raise ValueError(HOLDS_LORA.format("InternVL", "use_backbone_lora and use_qllama_lora"))
        objectives = {
            # The original does not bound the scale.
            "itc": ITC(max_scale=math.inf, label_smoothing=top["label_smoothing"]),
            "itm": ITM(dim=qllama["hidden_size"]),
            "itg": NextToken(),
        }
        middleware = qllama_of(top, (DEFAULTS | vision)["hidden_size"], qllama)
        return VLM(tower(vision, top["force_image_size"]), middleware, objectives=objectives)

    def fields_of(self, model: VLM) -> Config | None:
        encoder, middleware = model.encoder, model.middleware
        if not (isinstance(encoder, InternViT) and isinstance(middleware, QLLaMA)):
            return None
        if model.decoder is not None or not {"itc", "itm"} <= set(model.objectives):
            return None
        if middleware.query_tokens is None or middleware.clip_projector is None:
            return None
        vision = tower_config(encoder)
        if vision is None or middleware.rope_theta != ROPE_THETA:
            return None
        return {
            **qllama_top(middleware),
            "label_smoothing": model.objectives["itc"].label_smoothing,
            "vision_config": vision,
            "qllama_config": qllama_config(middleware),
        }

    def update(self, loaded: Config, fields: Config) -> Config:
        vision = fields["vision_config"]
        if loaded.get("force_image_size") == vision["image_size"]:
            del vision["image_size"]
        return super().update(loaded, fields)


def qllama_of(top: Config, encoder_dim: int, llama: Config, **others: object) -> QLLaMA:
    """QLLaMA from the general fields of a config and its `qllama_config`; `others` go to the
    constructor as they are."""
    check_only(llama, LLAMA_ONLY, "qllama_config")
    settings = {
        "encoder_dim": encoder_dim,
        "vocab_size": llama["vocab_size"],
        "dim": llama["hidden_size"],
        "depth": llama["num_hidden_layers"],
        "heads": llama["num_attention_heads"],
        "mlp_dim": llama["intermediate_size"],
        "num_queries": top["num_query_token"],
        "embed_dim": top["clip_embed_dim"],
        "pool_heads": top["attn_pool_num_heads"],
        "cross_every": top["cross_attention_frequency"],
        "rope_theta": ROPE_THETA,
        "norm_eps": llama["rms_norm_eps"],
    }
    return QLLaMA(**settings | others)


def qllama_top(middleware: QLLaMA) -> Config:
    """The fields of QLLaMA that stand beside `qllama_config`."""
    return {
        "clip_embed_dim": middleware.embed_dim,
        "attn_pool_num_heads": middleware.clip_projector.cross_attn.heads,
        "num_query_token": middleware.num_queries,
        "cross_attention_frequency": middleware.cross_every,
    }


def qllama_config(middleware: QLLaMA) -> Config:
    """The `qllama_config` of a QLLaMA."""
    lm = middleware.qllama
    return {
        "model_type": "llama",
        "hidden_size": middleware.dim,
        "num_hidden_layers": len(lm.model.layers),
        "num_attention_heads": middleware.dim // middleware.head_dim,
        "intermediate_size": lm.model.layers[0].mlp.gate_proj.out_features,
        "vocab_size": lm.model.embed_tokens.num_embeddings,
        "rms_norm_eps": lm.model.norm.eps,
        "tie_word_embeddings": False,
    }


LAYOUT = InternVL14B()
