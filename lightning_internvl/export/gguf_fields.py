"""What the metadata of a GGUF file say, and which models can be one.

Keys and values are those of llama.cpp's converters (conversion/base.py `TextModel` and `MmprojModel`
`.set_gguf_parameters`, internvl.py, qwenvl.py; for LLaVA convert_image_encoder_to_gguf.py); what its
reader (tools/mtmd/clip.cpp `load_hparams`, and the graphs in tools/mtmd/models/) takes otherwise than
the model was trained is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.export.gguf_tensors import LANGUAGES, rope_of
from lightning_internvl.messages import first_of

KINDS = {
    "llava": "LLaVA", "internvl": "InternVL", "internvl_chat": "InternVL", "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL",
}  # fmt: skip
LAYOUTS = ("llava_native", "internvl_native", "internvl_chat", "qwen2_vl", "qwen2_5_vl")
CAN = f"what can: {', '.join(dict.fromkeys(KINDS.values()))}, with {', '.join(LANGUAGES)}"
QWEN = ("qwen2_vl", "qwen2_5_vl")
GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new")  # llama.cpp has one of them
RMS_SIZE = (3200, 45)  # width and blocks by which the reader knows InternViT-6B, and its norms


def text_part(config: Config) -> Config:
    """The config of the language model."""
    return config.get("text_config") or config.get("llm_config") or config


def gguf_faults(layout: str, config: Config) -> list[str]:
    """Why a model cannot be a pair of GGUF files; empty if it can."""
    kind = config.get("model_type")
    if kind not in KINDS or layout not in LAYOUTS:
        return [f"layout {layout} has no form in llama.cpp; {CAN}"]
    text = text_part(config)
    language = (text.get("architectures") or ["a model without architectures"])[0]
    faults = [] if language in LANGUAGES else [f"{language} is not among the language models; {CAN}"]
    faults += language_faults(LANGUAGES.get(language, ""), text)
    vision = config["vision_config"]
    own = {"llava": _llava_faults, "qwen2_vl": _qwen2_vl_faults, "qwen2_5_vl": _qwen2_5_vl_faults}
    return faults + own.get(kind, _internvl_faults)(config, vision)


def language_faults(architecture: str, text: Config) -> list[str]:
    """What llama.cpp does not have of an architecture's settings (src/models/llama.cpp, phi3.cpp,
    gemma3.cpp)."""
    faults, rope = [], rope_of(text)["rope_type"]
    can = ("default", "linear", "yarn", "dynamic", "llama3", *(["longrope"] if architecture == "phi3" else []))
    if rope not in can:
        faults.append(f"positions of rope_type={rope} are not written here; {', '.join(can)} are")
    wanted = "gelu_pytorch_tanh" if architecture == "gemma3" else "silu"
    if (found := text.get("hidden_act") or text.get("hidden_activation") or wanted) != wanted:
        faults.append(f"the language model's hidden_act={found} is not {wanted}, which llama.cpp takes")
    window = text.get("sliding_window")
    if architecture == "llama" and window and window < text["max_position_embeddings"]:
        faults.append(f"sliding_window={window}: llama.cpp's LLaMA, which Mistral is there, sees all tokens")
    own = {"gemma3": _gemma_constants, "qwen3moe": _experts_constants}.get(architecture)
    constants = own(text) if own else {}
    return faults + [f"{name}={found}: llama.cpp has {there}" for name, (found, there) in constants.items() if found != there]


def _experts_constants(text: Config) -> dict[str, tuple[Any, Any]]:
    """What a model has and what its reader has: experts in each block, whose shares add up to 1."""
    return {
        "norm_topk_prob": (text.get("norm_topk_prob", False), True),
        "decoder_sparse_step": (text.get("decoder_sparse_step", 1), 1),
        "mlp_only_layers": (text.get("mlp_only_layers") or [], []),
    }


def _gemma_constants(text: Config) -> dict[str, tuple[Any, Any]]:
    """The same of Gemma 3: which layers see a window, and their positions."""
    local = (text.get("rope_parameters") or {}).get("sliding_attention") or {"rope_theta": text.get("rope_local_base_freq")}
    whole = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(text["num_hidden_layers"])]
    return {
        "rope_local_base_freq": (local["rope_theta"] or 10000.0, 10000.0),
        "layer_types": (text.get("layer_types") or whole, whole),
        "query_pre_attn_scalar": (text.get("query_pre_attn_scalar", text["head_dim"]), text["head_dim"]),
        "use_bidirectional_attention": (bool(text.get("use_bidirectional_attention")), False),
    }


def misread(config: Config, pictures: Mapping[str, Any]) -> list[str]:
    """What llama.cpp computes otherwise than the model was trained, of a pair of files that it takes.

    Args:
        pictures: `preprocessor_config.json`.
    """
    vision = config["vision_config"]
    found = []
    if config["model_type"] == "llava" and pictures.get("do_center_crop") and not pictures.get("do_pad"):
        found.append("llama.cpp pads a picture to a square, and this run cut its middle out: other pixels than in training")
    if config["model_type"] in ("internvl", "internvl_chat"):
        size = vision["hidden_size"], tower_blocks(config)
        if (vision.get("norm_type") == "rms_norm") != (size == RMS_SIZE):
            norm, said = vision.get("norm_type", "layer_norm"), f"{size[0]} wide with {size[1]} blocks"
            found.append(
                f"the tower, {said}, has {norm}: llama.cpp takes rms_norm at 3200 and 45 alone, and computes others otherwise"
            )
    return found


def _llava_faults(config: Config, vision: Config) -> list[str]:
    faults, clip = [], vision["model_type"] == "clip_vision_model"
    if vision.get("hidden_act", "quick_gelu") not in (*GELU, "quick_gelu"):
        faults.append(f"the tower's hidden_act={vision['hidden_act']} is none of quick_gelu and gelu")
    if (strategy := config["vision_feature_select_strategy"]) != ("default" if clip else "full"):
        faults.append(f"vision_feature_select_strategy={strategy}: llama.cpp drops a class token, and no other")
    if (layers := _feature_layers(config)) != sorted(layers):
        faults.append(f"vision_feature_layer={config['vision_feature_layer']}: llama.cpp joins layers in their order")
    return faults


def _internvl_faults(config: Config, vision: Config) -> list[str]:
    faults = []
    if config.get("ps_version", "v2") != "v2":
        faults.append(f"ps_version={config['ps_version']}: llama.cpp shuffles pixels as v2 does")
    if vision.get("hidden_act", "gelu") not in (*GELU, "silu"):
        faults.append(f"the tower's hidden_act={vision['hidden_act']} is none of gelu and silu")
    return faults


QWEN_TOWER: Config = {"temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}


def _qwen2_vl_faults(config: Config, vision: Config) -> list[str]:
    return _other_values(vision, {"hidden_act": "quick_gelu", **QWEN_TOWER})


def _qwen2_5_vl_faults(config: Config, vision: Config) -> list[str]:
    full, depth = vision["fullatt_block_indexes"], vision["depth"]
    # the reader knows a step from one full layer to the next, and one size of windows
    even = list(range(full[0], depth, full[0] + 1)) if full else "every so many blocks"
    return _other_values(vision, {"hidden_act": "silu", "window_size": 112, "fullatt_block_indexes": even, **QWEN_TOWER})


def _other_values(vision: Config, wanted: Config) -> list[str]:
    off = [f"{name}={vision[name]}" for name, value in wanted.items() if vision.get(name, value) != value]
    return [f"{first_of(off)} of the tower: llama.cpp has {', '.join(f'{n}={v}' for n, v in wanted.items())}"] if off else []


def _feature_layers(config: Config) -> list[int]:
    """Which outputs are handed on, counted from that of the embeddings."""
    given = config["vision_feature_layer"]
    depth = config["vision_config"]["num_hidden_layers"]
    return [layer if layer >= 0 else depth + layer + 1 for layer in ([given] if isinstance(given, int) else given)]


def tower_blocks(config: Config) -> int:
    """The blocks of the tower up to the one whose output is handed on."""
    vision = config["vision_config"]
    if config["model_type"] in QWEN:
        return vision["depth"]
    if config["model_type"] == "llava":
        return max(_feature_layers(config))
    layer: int = config["select_layer" if config["model_type"] == "internvl_chat" else "vision_feature_layer"]
    return layer if layer >= 0 else vision["num_hidden_layers"] + layer + 1


def write_language_fields(writer: Any, text: Config, rows: int) -> None:
    """Sizes and positions of the language model.

    Args:
        rows: of the table of words.
    """
    import gguf

    rope = rope_of(text)
    heads, width = text["num_attention_heads"], text["hidden_size"]
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads") or heads)
    if (kind := {"linear": "LINEAR", "yarn": "YARN"}.get(rope["rope_type"])) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind])
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "YARN":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if (sections := rope.get("mrope_section")) is not None:
        writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(_attention_factor(text, rope))
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    size = text.get("head_dim")
    if size is not None:
        writer.add_key_length(size)
        writer.add_value_length(size)
    architecture = LANGUAGES[text["architectures"][0]]
    if architecture == "llama":
        writer.add_vocab_size(rows)
        writer.add_rope_dimension_count(size or width // heads)
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(_original_length(text, rope))
        writer.add_rope_dimension_count(int((size or width // heads) * rope.get("partial_rotary_factor", 1.0)))
    if architecture in ("phi3", "gemma3"):
        writer.add_sliding_window(text.get("sliding_window") or 0)
    if (cap := text.get("final_logit_softcapping")) is not None:
        writer.add_final_logit_softcapping(cap)
    if experts := text.get("num_experts") or text.get("num_local_experts"):  # the name in transformers 5
        writer.add_expert_count(experts)
        writer.add_expert_used_count(text["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])


def _original_length(text: Config, rope: Config) -> int:
    """The context before it was made longer."""
    asked = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    return asked or text["max_position_embeddings"]


def _attention_factor(text: Config, rope: Config) -> float:
    """By what the positions of `longrope` scale (`_compute_longrope_parameters` of transformers)."""
    if (given := rope.get("attention_factor")) is not None:
        return given
    before = _original_length(text, rope)
    times = text["max_position_embeddings"] / before
    return math.sqrt(1 + math.log(times) / math.log(before)) if times > 1 else 1.0


def write_vision_fields(writer: Any, config: Config, pictures: Mapping[str, Any]) -> None:
    """Sizes of the tower, how pictures are prepared, and what hands the tower's tokens on.

    Args:
        pictures: `preprocessor_config.json`.
    """
    import gguf

    kind, vision = config["model_type"], config["vision_config"]
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(text_part(config)["hidden_size"])
    writer.add_vision_image_size(_one(vision.get("image_size", 560)))  # of any size; the reader asks for one
    writer.add_vision_patch_size(_one(vision["patch_size"]))
    qwen, older = kind in QWEN, kind == "qwen2_vl"
    writer.add_vision_embedding_length(vision["embed_dim" if older else "hidden_size"])
    writer.add_vision_feed_forward_length(vision["hidden_size" if older else "intermediate_size"])  # as the converter has it
    writer.add_vision_block_count(tower_blocks(config))
    writer.add_vision_head_count(vision["num_heads" if qwen else "num_attention_heads"])
    writer.add_vision_image_mean(pictures["image_mean"])
    writer.add_vision_image_std(pictures["image_std"])
    projector = gguf.VisionProjectorType
    named = {"llava": "mlp", "qwen2_vl": projector.QWEN2VL, "qwen2_5_vl": projector.QWEN25VL}
    writer.add_clip_projector_type(named.get(kind, projector.INTERNVL))
    if kind == "qwen2_5_vl":
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
    if qwen:
        writer.add_vision_attention_layernorm_eps(1e-6)
        return
    small = 1e-5 if vision.get("model_type") == "clip_vision_model" else 1e-6
    writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", small))
    activation = vision.get("hidden_act", "quick_gelu" if kind == "llava" else "gelu")
    if activation in GELU:
        writer.add_vision_use_gelu(True)
    elif activation == "silu":
        writer.add_vision_use_silu(True)
    if kind == "llava":
        writer.add_bool("clip.has_text_encoder", False)
        writer.add_bool("clip.has_llava_projector", True)
        writer.add_array("clip.vision.feature_layer", _feature_layers(config))
        return
    writer.add_vision_projector_scale_factor(round(1 / config["downsample_ratio"]))
    low, high = (config.get(f"{end}_dynamic_patch") or pictures.get(f"{end}_patches") for end in ("min", "max"))
    if low and high:
        writer.add_vision_preproc_min_tiles(low)
        writer.add_vision_preproc_max_tiles(high)


def _one(size: int | list[int]) -> int:
    return size[0] if isinstance(size, list | tuple) else size
