"""BLIP-2 with its language model as transformers' `Blip2ForConditionalGeneration` reads it: OPT,
T5, or another."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families.language_model import language_model, language_rules
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
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.hf_seq2seq import HFSeq2SeqLM
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM

TOP: Config = {"num_query_tokens": 32, "image_token_index": None}
_COPIES = (
    "language_model.encoder.embed_tokens.weight",
    "language_model.decoder.embed_tokens.weight",
    "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


class Blip2(Layout):
    NAME = "BLIP-2 of transformers (Blip2ForConditionalGeneration)"
    NATIVE = True
    MODEL_TYPES = ("blip-2",)
    ARCHITECTURE = "Blip2ForConditionalGeneration"
    DEFAULTS = TOP | {"vision_config": VISION, "qformer_config": QFORMER}
    LANGUAGE = "text_config"
    FAMILY: ClassVar[str] = "blip_2"
    QFORMER_INPUTS: ClassVar[Config] = {"text": "none"}  # settings of the Q-Former beside its sizes

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """The one for retrieval has the same model_type and no language projection."""
        classes = config.get("architectures") or []
        projects = not classes and "language_projection.weight" in shapes
        return super().recognises(config, shapes) and (self.ARCHITECTURE in classes or projects)

    def canonical(self, name: str) -> str | None:
        """Older releases stored copies of tied tables, and one that is never used."""
        return None if name in _COPIES else super().canonical(name)

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *hf_tower_rules(),
            *hf_qformer_rules(None, "qformer.layernorm"),
            rename("middleware.proj.*", "language_projection.*"),
            *language_rules({}),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        q = QFORMER | config.get("qformer_config", {})
        if q["use_qformer_text_input"]:
            setting = "qformer_config.use_qformer_text_input"
            raise ValueError(f"{setting}=True is not supported with a language model; it must be False")
        return self.model(config, shapes)

    def model(self, config: Config, shapes: Shapes) -> VLM:
        """Tower, Q-Former and language model of a config of the BLIP-2 family."""
        top, vision = TOP | config, VISION | config.get("vision_config", {})
        if top["image_token_index"] is None:
            raise ValueError(
                "config.json has no image_token_index, the placeholder of visual tokens; releases of "
                "transformers before 4.46 did without, and the hub's copies have been brought up to date since"
            )
        encoder, decoder = hf_tower(vision), _decoder(config, shapes)
        middleware = qformer_of(
            config.get("qformer_config", {}),
            encoder.dim,
            num_queries=top["num_query_tokens"],
            vision_norm_eps=vision["layer_norm_eps"],
            decoder_dim=decoder.dim,
            **self.QFORMER_INPUTS,
        )
        return chat_model(encoder, middleware, decoder, image_token_id=top["image_token_index"])

    def fields_of(self, model: VLM) -> Config | None:
        fields = self.family_fields(model)
        if fields is None or model.middleware.text != "none":
            return None
        fields["qformer_config"]["use_qformer_text_input"] = False
        return fields

    def family_fields(self, model: VLM) -> Config | None:
        """What the parts say of a config of the BLIP-2 family; None for other models."""
        encoder, middleware, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, EvaViT) and isinstance(middleware, QFormer)):
            return None
        if type(decoder) not in (HFCausalLM, HFSeq2SeqLM) or model.image_token_id is None:
            return None
        if middleware.embed_dim is not None or middleware.layers != (-1,):
            return None
        vision = hf_tower_config(encoder, f"{self.FAMILY}_vision_model")
        # one field for both
        if getattr(middleware.ln_vision, "eps", None) != vision["layer_norm_eps"]:
            return None
        return {
            "num_query_tokens": middleware.num_queries,
            "image_token_index": model.image_token_id,
            "vision_config": vision,
            "qformer_config": qformer_config(middleware) | {"encoder_hidden_size": encoder.dim},
            "text_config": {"vocab_size": decoder.vocab_size},
        }

    def new_config(self, model: VLM, fields: Config) -> Config:
        fields["qformer_config"]["model_type"] = f"{self.FAMILY}_qformer"
        causal = {"use_decoder_only_language_model": type(model.decoder) is HFCausalLM}
        return super().new_config(model, causal | fields)


def _decoder(config: Config, shapes: Shapes) -> HFCausalLM:
    """The language model of a config: a causal one, or an encoder-decoder."""
    text = {"model_type": "opt"} | config.get("text_config", {})
    causal = text["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    tied = "language_model.lm_head.weight" not in shapes
    return language_model(text, tied=tied, make=HFCausalLM if causal else HFSeq2SeqLM)


LAYOUT = Blip2()
