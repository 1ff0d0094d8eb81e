"""BLIP-2 for retrieval as transformers' `Blip2ForImageTextRetrieval` reads it: Q-Former with text,
projections, matching head."""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters.layout import Layout
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
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITM, QueryITC

TOP: Config = {"num_query_tokens": 32, "image_text_hidden_size": 256, "image_token_index": None}


class Blip2ITM(Layout):
    NAME = "BLIP-2 retrieval of transformers (Blip2ForImageTextRetrieval)"
    NATIVE = True
    MODEL_TYPES = ("blip-2",)
    ARCHITECTURE = "Blip2ForImageTextRetrieval"
    DEFAULTS = TOP | {"vision_config": VISION, "qformer_config": QFORMER}

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """Without the name of a class, the matching head tells."""
        classes = config.get("architectures") or []
        matches = not classes and "itm_head.weight" in shapes
        return super().recognises(config, shapes) and (self.ARCHITECTURE in classes or matches)

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *hf_tower_rules(),
            *hf_qformer_rules("embeddings", "qformer.layernorm"),
            rename("middleware.vision_proj.*", "vision_projection.*"),
            rename("middleware.text_proj.*", "text_projection.*"),
            rename("objectives.itm.itm_head.*", "itm_head.*"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        """Similarities are plain cosines, for the layout holds no temperature."""
        top, q = TOP | config, QFORMER | config.get("qformer_config", {})
        if not q["use_qformer_text_input"]:
            setting = "qformer_config.use_qformer_text_input"
            raise ValueError(f"{setting}=False is not supported for retrieval; it must be True")
        vision = VISION | config.get("vision_config", {})
        encoder = hf_tower(vision)
        middleware = qformer_of(
            q,
            encoder.dim,
            num_queries=top["num_query_tokens"],
            vision_norm_eps=vision["layer_norm_eps"],
            text="read",
            embed_dim=top["image_text_hidden_size"],
            image_prefix=top["image_token_index"] is not None,
        )
        objectives = {"itc": QueryITC(init_temp=1.0, learnable=False), "itm": ITM(dim=middleware.dim)}
        return VLM(encoder, middleware, objectives=objectives)

    def fields_of(self, model: VLM) -> Config | None:
        encoder, middleware = model.encoder, model.middleware
        if not (isinstance(encoder, EvaViT) and isinstance(middleware, QFormer)):
            return None
        if model.decoder is not None or "itm" not in model.objectives:
            return None
        contrast = dict(model.objectives.items()).get("itc")
        if isinstance(getattr(contrast, "temp", None), nn.Parameter):
            return None
        if middleware.text != "read" or middleware.embed_dim is None:
            return None
        vision = hf_tower_config(encoder, "blip_2_vision_model")
        if getattr(middleware.ln_vision, "eps", None) != vision["layer_norm_eps"]:
            return None
        reads = {"use_qformer_text_input": True, "encoder_hidden_size": encoder.dim}
        return {
            "num_query_tokens": middleware.num_queries,
            "image_text_hidden_size": middleware.embed_dim,
            "vision_config": vision,
            "qformer_config": qformer_config(middleware) | reads,
        }

    def new_config(self, model: VLM, fields: Config) -> Config:
        fields["qformer_config"]["model_type"] = "blip_2_qformer"
        return super().new_config(model, {"image_token_index": None, **fields})


LAYOUT = Blip2ITM()
