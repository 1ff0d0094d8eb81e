"""BLIP-2 with its language model as transformers' `Blip2ForConditionalGeneration` reads it: OPT, T5, or another."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.language_model import language_config, language_model, language_rules
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
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.hf_seq2seq import HFSeq2SeqLM
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "BLIP-2 of transformers (Blip2ForConditionalGeneration)"
NATIVE = True
SINGLE_FILE = False

TOP: Config = {"num_query_tokens": 32, "image_token_index": None}
# Copies of tied tables, and buffers, that files of older releases hold.
_COPIES = {f"language_model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
_NEVER_USED = "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a config is of this class; the one for retrieval has the same model_type and no language projection."""
    classes = config.get("architectures") or []
    mine = "Blip2ForConditionalGeneration" in classes or (not classes and "language_projection.weight" in shapes)
    return config.get("model_type") == "blip-2" and mine


def canonical(name: str) -> str | None:
    """Copies of tied tables and position numbers that older releases stored are no weights."""
    return None if name in _COPIES or name == _NEVER_USED or name.endswith(".position_ids") else name


def rules(config: Config) -> list[NameRule]:
    """Tower, Q-Former without text, projection, language model."""
    return [
        *hf_tower_rules(),
        *hf_qformer_rules(None, "qformer.layernorm"),
        rename("middleware.proj.*", "language_projection.*"),
        *language_rules({}),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    q = QFORMER | config.get("qformer_config", {})
    if q["use_qformer_text_input"]:
        raise ValueError("qformer_config.use_qformer_text_input=True is not supported with a language model; it must be False")
    return model_of(config, shapes, text="none")


def model_of(config: Config, shapes: Shapes, **qformer: object) -> VLM:
    """Tower, Q-Former and language model of a config of the BLIP-2 family; `qformer` goes to the Q-Former."""
    top, vision = TOP | config, VISION | config.get("vision_config", {})
    if top["image_token_index"] is None:
        raise ValueError(
            "config.json has no image_token_index, the placeholder of visual tokens; releases of transformers before 4.46 did "
            "without, and the hub's copies have been brought up to date since"
        )
    encoder, decoder = hf_tower(vision), decoder_of(config, shapes)
    middleware = qformer_of(
        config.get("qformer_config", {}), encoder.dim, num_queries=top["num_query_tokens"],
        vision_norm_eps=vision["layer_norm_eps"], decoder_dim=decoder.dim, **qformer,
    )  # fmt: skip
    objectives = {"next_token": NextToken()}
    return VLM(encoder, middleware, decoder, objectives=objectives, image_token_id=top["image_token_index"])


def decoder_of(config: Config, shapes: Shapes) -> HFCausalLM:
    """The language model of a config: a causal one, or an encoder-decoder."""
    text = {"model_type": "opt"} | config.get("text_config", {})
    causal = text["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    tied = "language_model.lm_head.weight" not in shapes
    return language_model(text, tied=tied, make=HFCausalLM if causal else HFSeq2SeqLM)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    made = made_of(model, "blip_2")
    if made is None or model.middleware.text != "none":
        return None
    made["qformer_config"]["use_qformer_text_input"] = False
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, TOP | {"vision_config": VISION, "qformer_config": QFORMER}, made)
    return complete(model, made, "Blip2ForConditionalGeneration", "blip-2", "blip_2")


def made_of(model: VLM, family: str) -> Config | None:
    """What the parts say of the config of a BLIP-2-like model, None if transformers has no such model."""
    encoder, middleware, decoder = model.encoder, model.middleware, model.decoder
    if not (isinstance(encoder, EvaViT) and isinstance(middleware, QFormer) and type(decoder) in (HFCausalLM, HFSeq2SeqLM)):
        return None
    if model.image_token_id is None or middleware.embed_dim is not None or middleware.layers != (-1,):
        return None
    if getattr(middleware.ln_vision, "eps", None) != encoder.blocks[0].norm1.eps:  # one field for both there
        return None
    return {
        "num_query_tokens": middleware.num_queries,
        "image_token_index": model.image_token_id,
        "vision_config": hf_tower_config(encoder, f"{family}_vision_model"),
        "qformer_config": qformer_config(middleware) | {"encoder_hidden_size": encoder.dim},
        "text_config": {"vocab_size": decoder.vocab_size},
    }


def complete(model: VLM, made: Config, name: str, model_type: str, family: str) -> Config:
    """A config for a model that came from no folder of transformers."""
    made["qformer_config"]["model_type"] = f"{family}_qformer"
    made["text_config"] = language_config(model.decoder)
    causal = type(model.decoder) is HFCausalLM
    return {"architectures": [name], "model_type": model_type, "use_decoder_only_language_model": causal, **made}
