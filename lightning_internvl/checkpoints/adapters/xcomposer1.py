"""InternLM-XComposer 1 as released: EVA ViT-g, perceive sampler with its flags, InternLM (`modeling_InternLM_XComposer.py`).

The low-rank updates that its language model has built in are zero in the releases, because they were merged, and are read as
that. Where the files hold no tower or no language model, features stand in its place, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.families.lavis import DEFAULTS, NORM_EPS, TOWER, lavis_encoder, lavis_encoder_config
from lightning_internvl.checkpoints.families.qformer import QFORMER, lavis_qformer_rules, lavis_tower_rules, qformer_config
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.middleware.perceive_sampler import PerceiveSampler
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "InternLM-XComposer 1 as released (model_type 'InternLMXComposer')"
NATIVE = SINGLE_FILE = False

IMAGE = -200  # stands for one visual token; no word
TOP: Config = {"num_query_token": 32, "cross_attention_freq": 2, "vision_width": 1408, "internlm_lora": None}
# What the released configuration class fills in.
LANGUAGE: Config = {
    "vocab_size": 103168, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "hidden_act": "silu", "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-5, "pad_token_id": -1,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_UPDATED = {**{x: (f"self_attn.{x}_proj",) for x in "qkvo"}, "ffn": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") in ("InternLMXComposer", "internlm_xcomposer")


def canonical(name: str) -> str | None:
    """Buffers are no weights."""
    buffers = (".rotary_emb.inv_freq", ".rotary_emb.scale", ".position_ids")
    return None if name.endswith(buffers) else name


def rules(config: Config) -> list[NameRule]:
    """Tower, sampler and language model."""
    return [
        *lavis_tower_rules(TOWER),
        rename("middleware.flag_start", "flag_image_start"),
        rename("middleware.flag_end", "flag_image_end"),
        rename("middleware.proj.*", "internlm_proj.*"),
        *lavis_qformer_rules(),
        *_merged_rules(config.get("internlm_lora")),
        rename("decoder.lm.**", "internlm_model.**"),
    ]


def _merged_rules(lora: Config | None) -> list[NameRule]:
    """Weights beside which zero updates lie."""
    names = [name for key in (lora or {}).get("learn_param", ("q", "v", "ffn")) for name in _UPDATED[key]] if lora else []
    rules = []
    for name in names:
        ours, theirs = f"decoder.lm.model.layers.*.{name}.weight", f"internlm_model.model.layers.*.{name}"
        leaves = tuple(f"{theirs}.{leaf}.weight" for leaf in ("lora_A", "lora_B"))
        rules.append(NameRule((ours,), (f"{theirs}.weight", *leaves), _merged, _beside_zeros(lora.get("lora_r", 8))))
    return rules


def _merged(weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    if not b.is_meta and a.any() and b.any():
        raise ValueError("this XComposer checkpoint holds LoRA weights that were not merged; merge them first")
    return (weight,)


def _beside_zeros(rank: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def write(weight: Tensor) -> tuple[Tensor, ...]:
        rows, columns = weight.shape
        return weight, weight.new_zeros(rank, columns), weight.new_zeros(rows, rank)

    return write


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    top = TOP | LANGUAGE | config
    encoder = lavis_encoder(config, shapes, top["vision_width"])
    decoder = None
    if any(name.startswith("internlm_model.") for name in shapes):
        fields = {key: top[key] for key in LANGUAGE} | {"model_type": "llama", "attention_bias": top.get("kqvo_bias", True)}
        decoder = language_model(fields, tied="internlm_model.lm_head.weight" not in shapes)
    bert = QFORMER | config.get("bert_config", {})
    sampler = PerceiveSampler(
        encoder_dim=encoder.dim,
        decoder_dim=top["hidden_size"],
        num_queries=top["num_query_token"],
        dim=bert["hidden_size"],
        depth=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        mlp_dim=bert["intermediate_size"],
        cross_every=top["cross_attention_freq"],
        vision_norm_eps=NORM_EPS,
        norm_eps=bert["layer_norm_eps"],
        act=bert["hidden_act"],
        dropout=bert["hidden_dropout_prob"],
        attention_dropout=bert["attention_probs_dropout_prob"],
    )
    return VLM(encoder, sampler, decoder, objectives={"next_token": NextToken()}, image_token_id=IMAGE)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    sampler, decoder = model.middleware, model.decoder
    tower = lavis_encoder_config(model.encoder)
    if tower is None or not isinstance(sampler, PerceiveSampler) or sampler.ln_vision.eps != NORM_EPS:
        return None
    bert = qformer_config(sampler)
    frequency = bert.pop("cross_attention_frequency")
    made = tower | {"num_query_token": sampler.num_queries, "cross_attention_freq": frequency, "bert_config": bert}
    made |= {"hidden_size": sampler.proj.out_features, "internlm_lora": None}
    if decoder is not None:
        if not isinstance(decoder, HFCausalLM) or decoder.lm.config.model_type != "llama":
            return None
        language = language_config(decoder)
        made |= {key: language.get(key) for key in LANGUAGE} | {"kqvo_bias": language["attention_bias"]}
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, TOP | LANGUAGE | DEFAULTS | {"kqvo_bias": True}, made)
    return {"architectures": ["InternLMXComposerForCausalLM"], "model_type": "InternLMXComposer", **made}
