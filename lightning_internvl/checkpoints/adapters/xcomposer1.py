"""InternLM-XComposer 1 as released: EVA ViT-g, perceive sampler with its flags, InternLM
(`modeling_InternLM_XComposer.py`).

The low-rank updates that its language model has built in are zero in the releases, because they
were merged, and are read as that. Where the files hold no tower or no language model, features
stand in its place, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families import qformer
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.families.lavis import DEFAULTS, NORM_EPS, TOWER, lavis_encoder, lavis_encoder_config
from lightning_internvl.checkpoints.families.qformer import bert_blocks, lavis_qformer_rules, lavis_tower_rules
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.middleware.perceive_sampler import PerceiveSampler
from lightning_internvl.model.vlm import VLM

IMAGE = -200  # stands for one visual token; no word
TOP: Config = {"num_query_token": 32, "cross_attention_freq": 2, "vision_width": 1408, "internlm_lora": None}
# What the released configuration class fills in.
LANGUAGE: Config = {
    "vocab_size": 103168, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048,
    "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "pad_token_id": -1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_UPDATED = {**{x: (f"self_attn.{x}_proj",) for x in "qkvo"}, "ffn": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}


class XComposer1(Layout):
    NAME = "InternLM-XComposer 1 as released (model_type 'InternLMXComposer')"
    MODEL_TYPES = ("InternLMXComposer", "internlm_xcomposer")
    ARCHITECTURE = "InternLMXComposerForCausalLM"
    DEFAULTS = TOP | LANGUAGE | DEFAULTS | {"kqvo_bias": True}
    BUFFERS = (*Layout.BUFFERS, ".rotary_emb.scale")

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *lavis_tower_rules(TOWER),
            rename("middleware.flag_start", "flag_image_start"),
            rename("middleware.flag_end", "flag_image_end"),
            rename("middleware.proj.*", "internlm_proj.*"),
            *lavis_qformer_rules(),
            *_lora_rules(config.get("internlm_lora")),
            rename("decoder.lm.**", "internlm_model.**"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top = TOP | LANGUAGE | config
        encoder = lavis_encoder(config, shapes, top["vision_width"])
        decoder = None
        if any(name.startswith("internlm_model.") for name in shapes):
            fields = {key: top[key] for key in LANGUAGE} | {"model_type": "llama"}
            fields["attention_bias"] = top.get("kqvo_bias", True)
            decoder = language_model(fields, tied="internlm_model.lm_head.weight" not in shapes)
        bert = qformer.QFORMER | config.get("bert_config", {})
        sampler = PerceiveSampler(
            encoder_dim=encoder.dim,
            decoder_dim=top["hidden_size"],
            num_queries=top["num_query_token"],
            cross_every=top["cross_attention_freq"],
            vision_norm_eps=NORM_EPS,
            **bert_blocks(bert),
        )
        return chat_model(encoder, sampler, decoder, image_token_id=IMAGE)

    def fields_of(self, model: VLM) -> Config | None:
        sampler, decoder = model.middleware, model.decoder
        tower = lavis_encoder_config(model.encoder)
        if tower is None or not isinstance(sampler, PerceiveSampler) or sampler.ln_vision.eps != NORM_EPS:
            return None
        bert = qformer.qformer_config(sampler)
        frequency = bert.pop("cross_attention_frequency")
        fields = {
            **tower,
            "num_query_token": sampler.num_queries,
            "cross_attention_freq": frequency,
            "bert_config": bert,
            "hidden_size": sampler.proj.out_features,
            "internlm_lora": None,
        }
        if decoder is None:
            return fields
        if not isinstance(decoder, HFCausalLM) or decoder.lm.config.model_type != "llama":
            return None
        language = language_config(decoder)
        fields |= {key: language.get(key) for key in LANGUAGE}
        return fields | {"kqvo_bias": language["attention_bias"]}


def _lora_rules(lora: Config | None) -> list[NameRule]:
    """Weights beside which zero updates lie."""
    if not lora:
        return []
    rules, write = [], _with_zero_update(lora.get("lora_r", 8))
    for key in lora.get("learn_param", ("q", "v", "ffn")):
        for name in _UPDATED[key]:
            ours, theirs = f"decoder.lm.model.layers.*.{name}", f"internlm_model.model.layers.*.{name}"
            official = tuple(f"{theirs}.{x}weight" for x in ("", "lora_A.", "lora_B."))
            rules.append(NameRule((f"{ours}.weight",), official, _without_zero_update, write))
    return rules


def _without_zero_update(weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    if not b.is_meta and a.any() and b.any():
        raise ValueError("this XComposer checkpoint holds LoRA weights that were not merged; merge them first")
    return (weight,)


def _with_zero_update(rank: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def write(weight: Tensor) -> tuple[Tensor, ...]:
        rows, columns = weight.shape
        return weight, weight.new_zeros(rank, columns), weight.new_zeros(rows, rank)

    return write


LAYOUT = XComposer1()
