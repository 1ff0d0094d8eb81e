"""Names and bytes at the published sizes, on the meta device: beside published index files, else beside transformers' class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from lightning_internvl.checkpoints.adapters import all_layouts, layout_of_checkpoint
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.families.open_clip import NOTES
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.vlm import VLM

Shapes = dict[str, tuple[int, ...]]
VIT_300M = {
    "model_type": "intern_vit_6b", "hidden_size": 1024, "image_size": 448, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "norm_type": "layer_norm",
    "qk_normalization": False, "qkv_bias": True, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}
EVA_G = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 39,
    "patch_size": 14, "image_size": 224, "qkv_bias": True,
}  # fmt: skip
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
INTERNLM2_7B = LLAMA_7B | {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "bias": False,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 92553,
    "max_position_embeddings": 32768,
}
QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_32B = QWEN3_8B | {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_hidden_layers": 64}
QWEN2_5_VL = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 151655,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "rms_norm_eps": 1e-6}
QWEN3_VL_8B = {
    "model_type": "qwen3_vl", "image_token_id": 151655, "video_token_id": 151656, "tie_word_embeddings": False,
    "text_config": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36},
    "vision_config": {"out_hidden_size": 4096},
}  # fmt: skip
QWEN3_VL_2B = QWEN3_VL_8B | {
    "text_config": {
        **QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "hidden_size": 1024, "depth": 24, "intermediate_size": 4096, "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "tie_word_embeddings": True,
}  # fmt: skip
# model_type, config, a tensor that tells tied from untied, names, bytes, bytes of a number; where the last three are written
INDEXES = {
    # model.safetensors.index.json as quoted in github.com/cuijunjie18/my_notebook uv/ICT_note.md
    "InternVL2_5-8B": (
        {
            "model_type": "internvl_chat",
            "llm_config": INTERNLM2_7B,
            "vision_config": VIT_300M,
            "downsample_ratio": 0.5,
            "force_image_size": 448,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
        },
        "language_model.output.weight",
        573,
        16_150_730_752,
        2,
    ),
    # model.safetensors.index.json of github.com/mohamadfayez/ain-model, a fine-tune of Qwen2-VL-7B in float32
    "Qwen2-VL-7B": (
        QWEN2_7B
        | {
            "model_type": "qwen2_vl",
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {
                "depth": 32,
                "embed_dim": 1280,
                "mlp_ratio": 4,
                "num_heads": 16,
                "in_chans": 3,
                "hidden_size": 3584,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        "lm_head.weight",
        730,
        33_165_502_464,
        4,
    ),
}
LLAVA_BYTES = (
    13_518_798_848  # pytorch_model.bin.index.json of liuhaotian/llava-v1.5-7b, as quoted in public notes; holds no tower
)
OPT = {
    "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
    "word_embed_proj_dim": 2560, "vocab_size": 50304, "max_position_embeddings": 2048,
}  # fmt: skip
QFORMER = {"num_hidden_layers": 12, "hidden_size": 768, "encoder_hidden_size": 1408, "cross_attention_frequency": 2}
QWEN2_05B = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "vocab_size": 151674, "tie_word_embeddings": False,
}  # fmt: skip
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
NATIVE_300M = {key: VIT_300M[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")}
SAM_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 1024, "patch_size": 16}
NATIVE_6B = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25, "num_hidden_layers": 45, "use_qk_norm": True,
    "norm_type": "rms_norm",
}  # fmt: skip


def internvl(text: Config, vision: Config | None = None) -> tuple[str, str, Config]:
    vision = vision or NATIVE_300M | {"attention_bias": True}
    config = {"model_type": "internvl", "image_token_id": 151667, "tie_word_embeddings": False}
    return "internvl_native", "InternVLForConditionalGeneration", config | {"text_config": text, "vision_config": vision}


# layout, class of transformers, config
STOCK: dict[str, tuple[str, str, Config]] = {
    "InternVL3-1B-hf": internvl(QWEN2_05B),
    "InternVL3-8B-hf": internvl(QWEN2_7B | {"model_type": "qwen2", "vocab_size": 151674}),
    "InternVL3_5-8B-HF": internvl(QWEN3_8B),
    "InternVL3_5-38B-HF": internvl(QWEN3_32B, NATIVE_6B),
    "InternViT-300M": (
        "intern_vit_native",
        "InternVLVisionModel",
        NATIVE_300M | {"model_type": "internvl_vision", "attention_bias": True},
    ),
    "llava-1.5-7b-hf": (
        "llava_native",
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "tie_word_embeddings": False,
            "text_config": LLAMA_7B | {"model_type": "llama", "vocab_size": 32064},
            "vision_config": CLIP_L | {"model_type": "clip_vision_model", "image_size": 336},
        },
    ),
    "Qwen2-VL-2B": (
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            "model_type": "qwen2_vl",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "image_token_id": 151655,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"hidden_size": 1536},
        },
    ),
    "Qwen2.5-VL-3B": (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        QWEN2_5_VL
        | {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "tokens_per_second": 2},
        },
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        QWEN2_7B | QWEN2_5_VL | {"vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "tokens_per_second": 2}},
    ),
    "Qwen3-VL-2B": ("qwen3_vl", "Qwen3VLForConditionalGeneration", QWEN3_VL_2B),
    "Qwen3-VL-8B": ("qwen3_vl", "Qwen3VLForConditionalGeneration", QWEN3_VL_8B),
    "blip2-opt-2.7b": (
        "blip2_hf",
        "Blip2ForConditionalGeneration",
        {
            "model_type": "blip-2",
            "image_token_index": 50265,
            "num_query_tokens": 32,
            "text_config": OPT,
            "vision_config": EVA_G,
            "qformer_config": QFORMER,
        },
    ),
    "blip2-itm-vit-g": (
        "blip2_itm_hf",
        "Blip2ForImageTextRetrieval",
        {
            "model_type": "blip-2",
            "image_text_hidden_size": 256,
            "num_query_tokens": 32,
            "vision_config": EVA_G,
            "text_config": OPT,
            "qformer_config": QFORMER | {"use_qformer_text_input": True},
        },
    ),
    "instructblip-vicuna-7b": (
        "instructblip_hf",
        "InstructBlipForConditionalGeneration",
        {
            "model_type": "instructblip",
            "image_token_index": 32000,
            "num_query_tokens": 32,
            "vision_config": EVA_G,
            "text_config": LLAMA_7B | {"model_type": "llama", "vocab_size": 32001},
            "qformer_config": QFORMER | {"vocab_size": 30523},
        },
    ),
    "clip-vit-large-patch14": (
        "clip",
        "CLIPModel",
        {
            "model_type": "clip",
            "projection_dim": 768,
            "vision_config": CLIP_L | {"image_size": 224},
            "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 49407},
        },
    ),
    "siglip-so400m-patch14-384": (
        "siglip",
        "SiglipModel",
        {"model_type": "siglip", "text_config": SO400M, "vision_config": SO400M | {"image_size": 384, "patch_size": 14}},
    ),
    "clip-vit-large-patch14-336, its tower": (
        "clip_siglip_vision",
        "CLIPVisionModel",
        CLIP_L | {"model_type": "clip_vision_model", "image_size": 336},
    ),
    "deepseek-vl-1.3b": (
        "deepseek_vl_hf",
        "DeepseekVLForConditionalGeneration",
        {
            "model_type": "deepseek_vl",
            "image_token_id": 100015,
            "tie_word_embeddings": False,
            "text_config": LLAMA_7B
            | {
                "model_type": "llama",
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "num_key_value_heads": 16,
                "vocab_size": 102400,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "image_size": 384,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 16,
                "vision_use_head": False,
            },
        },
    ),
}
# further layouts that hold the same parameters under other names
OTHERS = {
    "clip-vit-large-patch14": "clip_openai",
    "InternVL3-1B-hf": "internvl_chat",
    "llava-1.5-7b-hf": "llava",
    "InternViT-300M": "intern_vit",
}


def built(config: Config, shapes: Shapes) -> tuple[Layout, VLM]:
    layout = layout_of_checkpoint(config, shapes)
    with torch.device("meta"):
        model = layout.build(config, {name: shapes[there] for there in shapes if (name := layout.canonical(there))})
    if model.decoder is not None:
        model.decoder.tie()
    return layout, model


def official(layout: Layout, config: Config, model: VLM) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in layout.official_tensors(config, own_tensors(model)).items()}


def numbers(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize("name", INDEXES)
def test_names_and_bytes_are_those_of_published_index_files(name: str) -> None:
    config, head, names, size, width = INDEXES[name]
    found = official(*(lambda layout, model: (layout, config, model))(*built(config, {head: (1, 1)})))
    assert (len(found), numbers(found) * width) == (names, size)


def test_llava_as_released() -> None:
    """Its files hold no tower, and of each block a table of 64 frequencies in float32."""
    config = LLAMA_7B | {
        "model_type": "llava",
        "vocab_size": 32000,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
    }
    config |= {"vision_config": CLIP_L | {"image_size": 336}, "image_aspect_ratio": "pad"}
    layout, model = built(config, {"lm_head.weight": (32000, 4096)})
    found = {name: shape for name, shape in official(layout, config, model).items() if "vision_tower" not in name}
    assert numbers(found) * 2 + 32 * 64 * 4 == LLAVA_BYTES


@pytest.mark.parametrize("name", STOCK)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    key, kind, fields = STOCK[name]
    own: Any = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        stock = getattr(transformers, kind)(own)
    # a tied table stands in the state dict under both names, and in a file under one
    tied = set(stock.all_tied_weights_keys)
    theirs = {n: tuple(t.shape) for n, t in stock.state_dict().items() if n not in tied and not n.endswith("position_ids")}
    layout, model = built(own.to_dict(), theirs)
    assert layout.key == key
    ours = official(layout, own.to_dict(), model)
    known = {there: layout.canonical(there) for there in theirs}
    assert {n: ours.get(n) or (1,) for n in ours} == {known[t]: theirs[t] or (1,) for t in theirs if known[t]}
    if other := OTHERS.get(name):
        written = all_layouts()[other]
        config = written.config_of(model)
        more = len(NOTES) if other == "clip_openai" else 0  # what OpenAI's files say beside their weights
        assert numbers(official(written, config, model)) == numbers(ours) + more
