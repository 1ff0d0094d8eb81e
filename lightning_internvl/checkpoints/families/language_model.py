"""The language model in a chat checkpoint: Hugging Face's layouts, and InternLM2's fused one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_internvl.checkpoints.families.experts import expert_rules, older_expert_fields
from lightning_internvl.checkpoints.name_rules import Config, NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.hub import NOTES

FUSED = "InternLM2ForCausalLM"  # grouped query, key and value in one matrix; a LLaMA otherwise

# Fields of InternLM2 that LLaMA has under the same name.
_SHARED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling",
    "max_position_embeddings", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id",
    "initializer_range",
)  # fmt: skip
# Fields of InternLM3, whose tensors are named as LLaMA's.
_INTERNLM3 = (*_SHARED, "head_dim", "attention_dropout")
_INTERNLM2_DEFAULTS: Config = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048}


def is_fused(config: Config) -> bool:
    """Whether a language model's config is InternLM2's."""
    return FUSED in (config.get("architectures") or []) or config.get("model_type") == "internlm2"


def language_model(config: Config, *, tied: bool, make: Callable[..., HFCausalLM] = HFCausalLM) -> HFCausalLM:
    """The decoder of a language model's config, with fresh weights.

    Args:
        tied: whether output and input embeddings are one tensor; what the files hold decides, not
            the config.
        make: called with the config that transformers knows; a decoder with parts of its own, or
            the plain one.

    Raises:
        ValueError: if the config does not say which model it is.
    """
    if is_fused(config):
        known = _INTERNLM2_DEFAULTS | config
        fields = {key: known[key] for key in _SHARED if known.get(key) is not None}
        config = {**fields, "model_type": "llama", "attention_bias": config.get("bias", True)}
    elif config.get("model_type") == "internlm3":
        config = _as_llama(config)
    if "model_type" not in config:
        raise ValueError("the config of the language model has no model_type")
    # the chat models of transformers and of the releases add no router's loss, whatever is said here
    fields = {key: value for key, value in config.items() if key not in (*NOTES, "output_router_logits")}
    return make(config=fields | {"tie_word_embeddings": tied})


def _as_llama(config: Config) -> Config:
    """The config of InternLM3 (`configuration_internlm3.py`) as LLaMA has it.

    Raises:
        ValueError: for biases of queries, keys and values that the other layers do not have.
    """
    bias = config.get("bias", False)
    if config.get("qkv_bias", bias) != bias:
        raise ValueError(f"InternLM3 with qkv_bias={config['qkv_bias']} and {bias=} is not known; they must be equal")
    fields = {key: config[key] for key in _INTERNLM3 if config.get(key) is not None}
    return {**fields, "model_type": "llama", "attention_bias": bias, "mlp_bias": bias}


def language_config(decoder: HFCausalLM) -> Config:
    """The config of a decoder as transformers writes it, with what other readers take: the class,
    and the fields of before transformers 5.

    Raises:
        ValueError: for a decoder that counts visual tokens by another step than words, which no
            such config says.
    """
    if (step := getattr(decoder, "visual_step", 1.0)) != 1.0:
        raise ValueError(
            f"decoder.visual_step={step} has no field in a config of transformers; this project's own layout holds it"
        )
    config, kind = decoder.plain_config, type(decoder.lm)
    classes = {"architectures": [kind.__name__]} if kind.__module__.startswith("transformers.") else {}
    return config | classes | older_rope_fields(config) | older_expert_fields(config)


def older_rope_fields(config: Config) -> Config:
    """What transformers 4 reads in place of `rope_parameters`, and with it vLLM, LMDeploy and
    llama.cpp; without them it would take its defaults in silence. Nothing for a config without
    rotary positions."""
    rope = dict(config.get("rope_parameters") or {})
    if rope.keys() == {"full_attention", "sliding_attention"}:  # Gemma 3
        own = {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        return older_rope_fields(config | {"rope_parameters": rope["full_attention"]}) | own
    if "rope_theta" not in rope:
        return {}
    fields = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
    old = rope.pop("type", "default")
    kind = rope.pop("rope_type", old)
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if config.get("model_type") == "phi3":  # its class takes three fields and no other
        rope.pop("original_max_position_embeddings", None)
        fields["rope_scaling"] = {"type": kind, **rope} if rope else None
    elif kind != "default" or rope:
        named = "mrope" if "mrope_section" in rope else kind
        fields["rope_scaling"] = {"rope_type": kind, "type": named, **rope}
    return fields


def internlm2_config(decoder: HFCausalLM) -> Config:
    """The config of a decoder of LLaMA's architecture as InternLM2 writes it."""
    config = language_config(decoder)
    # its class takes two fields and no other
    scaling = {key: value for key, value in (config["rope_scaling"] or {}).items() if key != "rope_type"}
    return {key: config.get(key) for key in _SHARED} | {"rope_scaling": scaling or None, "bias": config["attention_bias"]}


def language_rules(config: Config, prefix: str = "language_model.") -> list[NameRule]:
    """The language model below `prefix`."""
    if not is_fused(config):
        return [*expert_rules(config, prefix), rename("decoder.lm.**", f"{prefix}**")]
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    ours, theirs = "decoder.lm.model.layers.*", f"{prefix}model.layers.*"
    return [
        rename("decoder.lm.model.embed_tokens.weight", f"{prefix}model.tok_embeddings.weight"),
        rename("decoder.lm.model.norm.weight", f"{prefix}model.norm.weight"),
        rename("decoder.lm.lm_head.weight", f"{prefix}output.weight"),
        *(fused_rows(ours, f"{theirs}.attention.wqkv.{leaf}", leaf, heads, groups) for leaf in ("weight", "bias")),
        rename(f"{ours}.self_attn.o_proj.*", f"{theirs}.attention.wo.*"),
        rename(f"{ours}.mlp.gate_proj.weight", f"{theirs}.feed_forward.w1.weight"),
        rename(f"{ours}.mlp.up_proj.weight", f"{theirs}.feed_forward.w3.weight"),
        rename(f"{ours}.mlp.down_proj.weight", f"{theirs}.feed_forward.w2.weight"),
        rename(f"{ours}.input_layernorm.weight", f"{theirs}.attention_norm.weight"),
        rename(f"{ours}.post_attention_layernorm.weight", f"{theirs}.ffn_norm.weight"),
    ]


def fused_rows(ours: str, official: str, leaf: str, heads: int, groups: int) -> NameRule:
    """Query, key and value in one matrix, group by group: the queries that share a key, then this
    key, then its value."""
    per_group = heads // groups

    def read(fused: Tensor) -> tuple[Tensor, ...]:
        grouped = fused.unflatten(0, (groups, per_group + 2, -1))
        kinds = grouped.split([per_group, 1, 1], dim=1)
        return tuple(rows.flatten(0, 2).contiguous() for rows in kinds)

    def write(*rows: Tensor) -> tuple[Tensor, ...]:
        counts = (per_group, 1, 1)
        parts = [r.unflatten(0, (groups, n, -1)) for r, n in zip(rows, counts, strict=True)]
        return (torch.cat(parts, dim=1).flatten(0, 2),)

    names = tuple(f"{ours}.self_attn.{x}_proj.{leaf}" for x in "qkv")
    return NameRule(names, (official,), read, write)
