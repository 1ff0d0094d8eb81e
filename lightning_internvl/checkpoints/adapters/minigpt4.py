"""MiniGPT-4 with the names of its own code (`minigpt4.py`): Q-Former and `llama_proj`, or the
LLaMA-2 variant without Q-Former.

The released .pth hold `llama_proj` alone (see `minigpt4_projection`); this layout is the whole
state of the model. Features stand in the tower's place where the files hold none.
"""

from __future__ import annotations

from torch import nn

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families.language_model import language_model
from lightning_internvl.checkpoints.families.lavis import DEFAULTS, NORM_EPS, TOWER, lavis_encoder, lavis_encoder_config
from lightning_internvl.checkpoints.families.qformer import lavis_qformer_rules, lavis_tower_rules, qformer_config, qformer_of
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.middleware.concat import ConcatConnector
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM

IMAGE = -200  # stands for one visual token; no word
TOP: Config = {
    "has_qformer": True, "num_query_token": 32, "cross_attention_freq": 2, "concat": 4, "vision_width": 1408,
}  # fmt: skip


class MiniGPT4(Layout):
    NAME = "MiniGPT-4 with its own names (model_type 'minigpt4')"
    MODEL_TYPES = ("minigpt4",)
    DEFAULTS = TOP | DEFAULTS
    LANGUAGE = "llama_config"

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *lavis_tower_rules(TOWER),
            rename("middleware.proj.*", "llama_proj.*"),
            *lavis_qformer_rules(),
            rename("decoder.lm.**", "llama_model.**"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top = TOP | config
        encoder = lavis_encoder(config, shapes, top["vision_width"])
        text = {"model_type": "llama"} | config["llama_config"]
        decoder = language_model(text, tied="llama_model.lm_head.weight" not in shapes)
        dims = {"encoder_dim": encoder.dim, "decoder_dim": decoder.dim}
        if top["has_qformer"]:
            frequency = {"cross_attention_frequency": top["cross_attention_freq"]}
            middleware: QFormer | ConcatConnector = qformer_of(
                config.get("bert_config", {}) | frequency,
                num_queries=top["num_query_token"],
                vision_norm_eps=NORM_EPS,
                text="none",
                **dims,
            )
        else:
            middleware = ConcatConnector(**dims, concat=top["concat"], norm_eps=NORM_EPS)
        return chat_model(encoder, middleware, decoder, image_token_id=IMAGE)

    def fields_of(self, model: VLM) -> Config | None:
        middleware, decoder = model.middleware, model.decoder
        if not isinstance(decoder, HFCausalLM) or decoder.lm.config.model_type != "llama":
            return None
        if (tower := lavis_encoder_config(model.encoder)) is None:
            return None
        fields: Config = {**tower, "llama_config": {"vocab_size": decoder.vocab_size}}
        if type(middleware) is QFormer and middleware.text == "none":
            bert = qformer_config(middleware)
            fields |= {"has_qformer": True, "num_query_token": middleware.num_queries}
            fields["cross_attention_freq"] = bert.pop("cross_attention_frequency")
            fields["bert_config"] = bert
        elif isinstance(middleware, ConcatConnector):
            fields |= {"has_qformer": False, "concat": middleware.concat}
        else:
            return None
        norm = middleware.ln_vision
        return fields if isinstance(norm, nn.LayerNorm) and norm.eps == NORM_EPS else None


LAYOUT = MiniGPT4()
