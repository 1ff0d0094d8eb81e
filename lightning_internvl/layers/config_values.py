"""What the values of a `config.json` and of its like may be. The published systems share the names
of their fields, so that each has one meaning at any depth; a value that cannot be one is told
before anything is built of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers.activations import ACT2FN

from lightning_internvl.messages import first_of

SECTIONS = (
    "vision_config", "text_config", "llm_config", "language_config", "qllama_config", "qformer_config", "llama_config",
    "bert_config", "clip_vision_config", "high_res_vision_config", "aligner_config", "visual", "rope_parameters", "rope_scaling",
    "model_cfg", "vision_cfg", "text_cfg", "norm_kwargs", "act_kwargs",
)  # fmt: skip


class Numbers(NamedTuple):
    """The numbers that a field may have.

    Attributes:
        whole: whether only whole ones.
        none: whether it may be null.
        several: whether it may be a list of them.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = True
    none: bool = False
    several: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is one."""
        if isinstance(value, list):
            return self.several and bool(value) and all(self._is_one(one) for one in value)
        return self._is_one(value) or (value is None and self.none)

    def _is_one(self, value: Any) -> bool:
        number = isinstance(value, int if self.whole else int | float) and not isinstance(value, bool)
        return number and self.least <= value <= self.most and abs(value) != math.inf

    def __str__(self) -> str:
        bounds = [f"from {self.least:.10g}"] if self.least > -math.inf else []
        bounds += [f"to {self.most:.10g}"] if self.most < math.inf else []
        said = " ".join(["a whole number" if self.whole else "a number", *bounds])
        return said + " or a list of such" * self.several + " or null" * self.none


class Words(NamedTuple):
    """Of one type."""

    kind: type | tuple[type, ...]
    said: str
    none: bool = False
    several: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is one."""
        if self.several:
            return (value is None and self.none) or (isinstance(value, list) and all(isinstance(x, self.kind) for x in value))
        return isinstance(value, self.kind) or (value is None and self.none)

    def __str__(self) -> str:
        return self.said + " or null" * self.none


class Choice(NamedTuple):
    """One of several words."""

    words: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        """Whether a value is one."""
        return value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


SIZE, SIDE, TABLE = Numbers(1, 2**20), Numbers(1, 2**16, several=True), Numbers(1, 2**24)
SHARE, SCALE = Numbers(0, 1, whole=False), Numbers(0, whole=False)
WORD, SWITCH = Words(str, "a text"), Words(bool, "true or false")
LAYERS, ID = Numbers(-1000, 1000), Numbers(-(2**31), 2**31)
FIELDS: dict[Numbers | Words | Choice, tuple[str, ...]] = {
    SIZE: (
        "hidden_size", "intermediate_size", "encoder_hidden_size", "vision_width", "width", "d_model", "d_ff", "d_kv", "ffn_dim",
        "mlp_dim", "embed_dim", "clip_embed_dim", "projection_dim", "image_text_hidden_size", "word_embed_proj_dim", "output_dim",
        "output_channels", "kv_channels", "num_attention_heads", "num_heads", "heads", "attn_pool_num_heads", "head_width",
        "num_query_token", "num_query_tokens", "n_queries", "num_latents", "cross_attention_freq", "cross_attention_frequency",
        "cross_attn_every_n_layers", "num_channels", "in_channels", "spatial_merge_size", "window_size", "num_pos_feats",
        "out_hidden_size", "tokens_per_second",
        "lora_r", "concat", "relative_attention_num_buckets", "relative_attention_max_distance",
    ),
    Numbers(1, 500): ("num_hidden_layers", "num_layers", "num_decoder_layers", "depth"),
    Numbers(1, 500, several=True): ("layers",),
    SIDE: ("image_size", "patch_size", "temporal_patch_size", "img_size"),
    TABLE: ("vocab_size", "max_position_embeddings", "seq_length"),
    SIZE._replace(none=True): ("num_key_value_heads", "head_dim", "force_image_size"),
    Numbers(0, 2**20): ("use_backbone_lora", "use_qllama_lora", "use_llm_lora"),
    ID: ("image_start_id",),
    ID._replace(none=True): ("image_token_id", "image_token_index", "video_token_id", "media_token_id"),
    ID._replace(none=True, several=True): ("bos_token_id", "eos_token_id", "pad_token_id"),
    LAYERS: ("mm_vision_select_layer", "select_layer"),
    LAYERS._replace(several=True): ("vision_feature_layer",),
    Words(int, "a list of whole numbers", several=True): ("global_attn_indexes", "fullatt_block_indexes", "mrope_section"),
    SHARE: (
        "layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", "ln_vision_eps", "dropout", "dropout_rate", "attention_dropout",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "projection_dropout", "drop_path_rate", "label_smoothing",
    ),
    Numbers(0.01, 1, whole=False): ("downsample_ratio",),
    SCALE: ("initializer_factor", "initializer_range", "init_std", "lora_alpha"),
    Numbers(1e-3, 1e3, whole=False): ("mlp_ratio", "ff_mult", "factor"),
    Numbers(1e-3, 1e15, whole=False): ("rope_theta", "rotary_emb_base"),
    Numbers(-1e6, 1e6, whole=False): ("layer_scale_init_value", "logit_scale_init_value"),
    WORD: (
        "norm_type", "feed_forward_proj",
        "mm_projector_type", "mm_vision_select_feature", "mm_patch_merge_type", "vision_feature_select_strategy", "vision_proj",
        "rope_type", "ps_version",
    ),
    WORD._replace(none=True): ("model_type", "image_aspect_ratio", "tokenizer_padding_side", "mm_vision_tower"),
    Choice(tuple(ACT2FN)): ("hidden_act", "activation_function", "projector_hidden_act", "dense_act_fn"),
    Words((str, dict), "a text or a mapping", none=True): ("vision_tower",),
    Words(str, "a list of texts", none=True, several=True): ("architectures",),
    SWITCH: (
        "qkv_bias", "attention_bias", "mlp_bias", "bias", "no_bias", "multimodal_projector_bias", "qk_normalization",
        "use_qk_norm", "use_mean_pooling", "vision_use_head", "use_abs_pos", "use_rel_pos", "has_qformer", "use_dynamic_ntk",
        "use_logn_attn", "use_qformer_text_input", "use_decoder_only_language_model", "only_attend_immediate_media",
    ),
    SWITCH._replace(none=True): ("tie_word_embeddings",),
}  # fmt: skip
KINDS = {name: kind for kind, names in FIELDS.items() for name in names}


def check_values(config: Mapping[str, Any], what: str, between: str = ".") -> None:
    """Refuse values that no field of this name can have.

    Args:
        what: has the fields: a file or a setting, and what stands between it and them.

    Raises:
        ValueError: with the fields, their values and what is valid.
    """
    if faults := list(_faults(config, "")):
        raise ValueError(f"{what}{between}{first_of(faults)}")


@contextmanager
def fields_told(place: Path) -> Iterator[None]:
    """Inside, a field that a config lacks is told as a ValueError."""
    try:
        yield
    except KeyError as error:
        if error.args[0] not in (*KINDS, *SECTIONS):
            raise
        raise ValueError(f"{place}: config.json has no {error.args[0]}") from error


def _faults(section: Mapping[str, Any], start: str) -> Iterator[str]:
    for name, value in section.items():
        kind = KINDS.get(name)
        if kind is not None and not kind.holds(value):
            yield f"{start}{name}={value!r:.60} must be {kind}"
        elif name in SECTIONS and not isinstance(value, dict | type(None)):
            yield f"{start}{name}={value!r:.60} must be a mapping"
        elif isinstance(value, dict):
            yield from _faults(value, f"{start}{name}.")
