"""Folders of InternVL as published, but small: every tensor under its published name, with the published fields around it.

Names of the releases are written out from the official modelling code (`modeling_intern_vit.py`, `modeling_internvl_chat.py`
and those of the language models); those of transformers' layout come from its class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from internvl_names import Kind
from safetensors.torch import save_file
from tokenizer_files import sentencepiece_folder
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from lightning_internvl.data.tokenizer import toy_tokenizer

MARKS = [
    "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|start|>", "<|message|>", "<|channel|>", "<|return|>",
]  # fmt: skip
H, D, LAYERS, EXPERTS, HEAD = 128, 32, 2, 4, 8  # widths of tower and language model; their blocks
SIZES = {
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "bfloat16", "use_cache": False,
    "_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2",
}  # fmt: skip
_MOE = {
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
NOTES = ("architectures", "torch_dtype")
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 5e6},
    "internlm2": {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, "rope_theta": 1e6,
                  "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "internlm3": {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "bias": False, "qkv_bias": False,
                  "head_dim": HEAD, "rope_theta": 5e7, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "original_max_position_embeddings": 64,
             "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 4.0, 8.0]}},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False,
              "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": HEAD, "rope_theta": 1e6},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": HEAD, "rope_theta": 1e6,
                  **_MOE},
    "gpt_oss": {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "head_dim": HEAD, "num_local_experts": EXPERTS,
                "num_experts_per_tok": 2, "sliding_window": 128, "rope_theta": 150000, "rope_scaling": {
                    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                    "original_max_position_embeddings": 4096, "truncate": False}},
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "300M": {"qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm", "num_hidden_layers": 2},
    "6B": {"qk_normalization": True, "qkv_bias": False, "norm_type": "rms_norm", "num_hidden_layers": 5},
}
NATIVE_TOWERS: dict[str, dict[str, Any]] = {
    "300M": {"use_qk_norm": False, "attention_bias": True, "norm_type": "layer_norm", "num_hidden_layers": 2},
    "6B": {"use_qk_norm": True, "attention_bias": False, "norm_type": "rms_norm", "num_hidden_layers": 5},
}
_TOWER = {"hidden_size": H, "num_attention_heads": 1, "intermediate_size": 160, "image_size": 28, "patch_size": 14}
RELEASED = _TOWER | {
    "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "use_flash_attn": True, "hidden_act": "gelu",
    "dropout": 0.0, "attention_dropout": 0.0, "drop_path_rate": 0.0, "layer_norm_eps": 1e-6, "initializer_range": 0.02,
    "initializer_factor": 0.1, "torch_dtype": "bfloat16", "moe_coeff_ratio": 0.5, "use_moe": False,
}  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def tower_shapes(tower: str) -> Shapes:
    """`InternVisionModel`."""
    fields, found = TOWERS[tower], {}
    found |= {"embeddings.class_embedding": (1, 1, H), "embeddings.position_embedding": (1, 5, H)}
    found |= {"embeddings.patch_embedding.weight": (H, 3, 14, 14), "embeddings.patch_embedding.bias": (H,)}
    block = {"norm1.weight": (H,), "norm2.weight": (H,), "ls1": (H,), "ls2": (H,), "attn.qkv.weight": (3 * H, H)}
    block |= {"attn.proj.weight": (H, H), "attn.proj.bias": (H,), "mlp.fc1.weight": (160, H), "mlp.fc1.bias": (160,)}
    block |= {"mlp.fc2.weight": (H, 160), "mlp.fc2.bias": (H,)}
    block |= {"norm1.bias": (H,), "norm2.bias": (H,)} if fields["norm_type"] == "layer_norm" else {}
    block |= {"attn.qkv.bias": (3 * H,)} if fields["qkv_bias"] else {}
    block |= {"attn.q_norm.weight": (H,), "attn.k_norm.weight": (H,)} if fields["qk_normalization"] else {}
    for layer in range(fields["num_hidden_layers"]):
        found |= {f"encoder.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found


def language_shapes(language: str, words: int) -> Shapes:
    """The language model's own class."""
    q, kv, inside = 4 * HEAD, 2 * HEAD, 48
    attention = {"q_proj.weight": (q, D), "k_proj.weight": (kv, D), "v_proj.weight": (kv, D), "o_proj.weight": (D, q)}
    if language in ("qwen2", "gpt_oss"):
        attention |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    if language.startswith("qwen3"):
        attention |= {"q_norm.weight": (HEAD,), "k_norm.weight": (HEAD,)}
    if language == "gpt_oss":
        attention |= {"o_proj.bias": (D,), "sinks": (4,)}
    if language == "phi3":
        attention = {"qkv_proj.weight": (q + 2 * kv, D), "o_proj.weight": (D, q)}
    mlp: Shapes = {"gate_proj.weight": (inside, D), "up_proj.weight": (inside, D), "down_proj.weight": (D, inside)}
    if language == "phi3":
        mlp = {"gate_up_proj.weight": (2 * inside, D), "down_proj.weight": (D, inside)}
    if language == "qwen3_moe":
        one = {"gate_proj.weight": (16, D), "up_proj.weight": (16, D), "down_proj.weight": (D, 16)}
        mlp = {f"experts.{i}.{name}": shape for i in range(EXPERTS) for name, shape in one.items()} | {
            "gate.weight": (EXPERTS, D)
        }
    if language == "gpt_oss":
        mlp = {"router.weight": (EXPERTS, D), "router.bias": (EXPERTS,), "experts.gate_up_proj": (EXPERTS, D, 2 * inside)}
        mlp |= {"experts.gate_up_proj_bias": (EXPERTS, 2 * inside), "experts.down_proj": (EXPERTS, inside, D)}
        mlp |= {"experts.down_proj_bias": (EXPERTS, D)}
    block = {f"self_attn.{name}": shape for name, shape in attention.items()} | {f"mlp.{name}": s for name, s in mlp.items()}
    block |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    top = {"model.embed_tokens.weight": (words, D), "model.norm.weight": (D,), "lm_head.weight": (words, D)}
    if language == "internlm2":
        block = {"attention.wqkv.weight": (q + 2 * kv, D), "attention.wo.weight": (D, q), "attention_norm.weight": (D,)}
        block |= {"feed_forward.w1.weight": (inside, D), "feed_forward.w2.weight": (D, inside), "ffn_norm.weight": (D,)}
        block |= {"feed_forward.w3.weight": (inside, D)}
        top = {"model.tok_embeddings.weight": (words, D), "model.norm.weight": (D,), "output.weight": (words, D)}
    return top | {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}


def drawn(shapes: Shapes) -> dict[str, Tensor]:
    """Numbers, none of which is 0 or 1."""
    return {name: torch.randn(shape) * 0.1 + (1.0 if len(shape) == 1 else 0.0) for name, shape in shapes.items()}


def write_tokenizer(kind: str, folder: Path) -> None:
    """Files as the tokenizer of that name has them: SentencePiece of LLaMA, InternLM2 or 3, or Qwen's, or one JSON file."""
    if kind == "tokenizer.json":
        toy_tokenizer(MARKS).save_pretrained(folder)
    elif kind == "vocab.json":
        folder.mkdir(exist_ok=True)
        vocabulary = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
        added = {token: len(vocabulary) + i for i, token in enumerate(["<|endoftext|>", *MARKS])}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "added_tokens.json").write_text(json.dumps(added))
        entries = {str(i): {"content": token, "special": True, "normalized": False} for token, i in added.items()}
        config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": entries, "pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    else:
        pieces = sentencepiece_folder(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        size = pieces.get_piece_size()
        entries = {str(size + i): {"content": token, "special": True, "normalized": False} for i, token in enumerate(MARKS)}
        config["added_tokens_decoder"] = {k: v for k, v in config["added_tokens_decoder"].items() if int(k) < size} | entries
        config["tokenizer_class"] = f"{kind.replace('LLaMA', 'Llama')}Tokenizer"
        own = {"auto_map": {"AutoTokenizer": [f"tokenization_{kind.lower()}.{kind}Tokenizer", None]}} if kind != "LLaMA" else {}
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "auto_map"} | own))


def write_model(kind: Kind, folder: Path, words: int, image: int) -> None:
    """`config.json` and weights, for so many words, one of which stands for a visual token."""
    if kind.layout == "internvl_native":
        _write_native(kind, folder, words, image)
        return
    text, vision = SIZES | LANGUAGES[kind.language] | {"vocab_size": words}, RELEASED | TOWERS[kind.tower]
    tower, language = tower_shapes(kind.tower), language_shapes(kind.language, words)
    if kind.layout == "internvl_chat_llava":
        config = text | {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"}
        config |= {"mm_vision_tower": "OpenGVLab/InternViT-6B-224px", "mm_vision_select_layer": -4, "mm_hidden_size": H}
        shapes = {f"model.vision_tower.vision_tower.{name}": shape for name, shape in tower.items()} | language
        shapes |= {f"model.mm_projector.{i}.weight": (D, width) for i, width in ((0, H), (2, D))}
        shapes |= {f"model.mm_projector.{i}.bias": (D,) for i in (0, 2)}
    else:
        code = {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        }
        config = {
            "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "auto_map": code, "template": kind.template,
            "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 28, "max_dynamic_patch": 2,
            "min_dynamic_patch": 1, "pad2square": False, "ps_version": "v2", "select_layer": -1, "use_thumbnail": True,
            "use_backbone_lora": 0, "use_llm_lora": 0, "tie_word_embeddings": False, "llm_config": text, "vision_config": vision,
            **dict(kind.top),
        }  # fmt: skip
        shapes = {f"vision_model.{name}": shape for name, shape in tower.items()}
        shapes |= {f"language_model.{name}": shape for name, shape in language.items()}
        shapes |= {"mlp1.0.weight": (4 * H,), "mlp1.0.bias": (4 * H,), "mlp1.1.weight": (D, 4 * H), "mlp1.1.bias": (D,)}
        shapes |= {"mlp1.3.weight": (D, D), "mlp1.3.bias": (D,)}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(drawn(shapes), folder / "model.safetensors", metadata={"format": "pt"})


def _write_native(kind: Kind, folder: Path, words: int, image: int) -> None:
    text = SIZES | LANGUAGES[kind.language] | {"vocab_size": words}
    plain = {key: value for key, value in text.items() if "attn_implementation" not in key and key not in NOTES}
    plain |= {"model_type": "llama"} if kind.language == "internlm3" else {}  # which has its names
    vision = _TOWER | {"num_attention_heads": 2} | NATIVE_TOWERS[kind.tower]
    config = InternVLConfig(vision_config=vision, text_config=plain, image_token_id=image, tie_word_embeddings=False)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"text_config": text}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"max_patches": 2, "image_processor_type": "GotOcr2ImageProcessorFast"})
    )
