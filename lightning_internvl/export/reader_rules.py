"""What vLLM and llama.cpp ask of an exported folder, rule by rule as their sources have it; `engines`
runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning_internvl.export.gguf_fields import gguf_faults, misread, text_part
from lightning_internvl.files import read_json


class Folder(NamedTuple):
    """The files of an export, read."""

    layout: str
    config: Mapping[str, Any]
    pictures: Mapping[str, Any]
    processor: Mapping[str, Any]
    tokens: Mapping[str, Any]
    template: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """What a reader takes, where its source says so, and whether a folder has it.

    `layouts` limits a rule; empty means all.
    """

    source: str
    asks: str
    holds: Callable[[Folder], bool]
    layouts: tuple[str, ...] = ()


_MODELS = "vllm/model_executor/models"
_LOADER = "vllm/model_executor/model_loader/default_loader.py"
VLLM_CLASSES = (
    "InternVLForConditionalGeneration", "InternVLChatModel", "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Blip2ForConditionalGeneration", "CLIPModel", "SiglipModel",
)  # fmt: skip
VLLM_LANGUAGES = (
    "LlamaForCausalLM", "InternLM2ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "Phi3ForCausalLM", "GptOssForCausalLM", "Gemma3ForCausalLM", "MistralForCausalLM", "OPTForCausalLM",
)  # fmt: skip
INNER = ("internvl_native", "internvl_chat", "llava_native")
TILES = ("force_image_size", "select_layer", "downsample_ratio", "ps_version", "use_thumbnail", "max_dynamic_patch")
FRAME = ("start_image_token", "end_image_token", "context_image_token", "video_token")
PATCHES = ("patch_size", "vision_feature_select_strategy")


def _named(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or [""])[0]


def _old_rope(folder: Folder) -> bool:
    text = text_part(dict(folder.config))
    new = text.get("rope_parameters") or {}
    return "rope_theta" not in new or text.get("rope_theta") == new["rope_theta"]


def _one_set(folder: Folder) -> bool:
    return all(name.startswith("model") for name in folder.weights)


def _known_class(folder: Folder) -> bool:
    return _named(folder.config) in VLLM_CLASSES


def _statistics(folder: Folder) -> bool:
    return {"image_mean", "image_std"} <= set(folder.pictures)


RULES: Mapping[str, tuple[Rule, ...]] = {
    "vllm": (
        Rule(f"{_MODELS}/registry.py _MULTIMODAL_MODELS", "a class that it has in architectures", _known_class),
        Rule(
            f"{_MODELS}/utils.py init_vllm_registered_model",
            "the class of the language model in its own architectures",
            lambda f: _named(text_part(dict(f.config))) in VLLM_LANGUAGES,
            INNER,
        ),
        Rule("vllm/transformers_utils/config.py patch_rope_parameters", "rope_theta, for transformers 4", _old_rope),
        Rule(
            f"{_MODELS}/interns1.py _get_prompt_updates",
            f"{', '.join(FRAME)} of the tokenizer",
            lambda f: all(f.tokens.get(name) for name in FRAME),
            ("internvl_native",),
        ),
        Rule(
            f"{_MODELS}/internvl.py InternVLChatModel.__init__",
            f"{', '.join(TILES)}",
            lambda f: all(name in f.config for name in TILES),
            ("internvl_chat",),
        ),
        Rule(
            f"{_MODELS}/internvl.py input_processor_for_internvl",
            "<image> in prompts, which it replaces by <img>, the visual tokens and </img>",
            lambda f: "<IMG_CONTEXT>" not in f.template,
            ("internvl_chat",),
        ),
        Rule(
            f"{_MODELS}/llava.py get_num_image_tokens",
            f"{', '.join(PATCHES)} of the processor, image_token_index",
            lambda f: all(name in f.processor for name in PATCHES) and "image_token_index" in f.config,
            ("llava_native",),
        ),
        Rule(
            "vllm/model_executor/layers/rotary_embedding.py get_input_positions_tensor",
            "vision_start_token_id and image_token_id",
            lambda f: "vision_start_token_id" in f.config and "image_token_id" in f.config,
            ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
        ),
        Rule(f"{_LOADER} _prepare_weights", "no other *.safetensors beside the weights", _one_set),
    ),
    "llama_cpp": (
        Rule(
            "conversion/base.py get_model_architecture",
            "the class of the language model in text_config",
            lambda f: bool(_named(text_part(dict(f.config)))),
        ),
        Rule(
            "conversion/__init__.py MMPROJ_MODEL_MAP",
            "InternVisionModel in the architectures of vision_config",
            lambda f: _named(f.config["vision_config"]) == "InternVisionModel",
            ("internvl_native", "internvl_chat"),
        ),
        Rule("conversion/base.py TextModel.set_gguf_parameters", "rope_theta beside rope_parameters", _old_rope),
        Rule("conversion/base.py MmprojModel.set_gguf_parameters", "image_mean and image_std", _statistics),
    ),
}  # fmt: skip


# Folders that llama.cpp reads by `to=FILE.gguf` alone, and what its own converter has against them.
NOT_CONVERTED = {
    "internvl_native": "conversion/intern_vision.py modify_tensors skips vision_tower.*, the names of published folders",
    "llava_native": "conversion/llava.py LlavaVisionModel.__init__ refuses all towers but Pixtral's",
}


def check_rules(place: Path, layout: str, readers: tuple[str, ...]) -> list[str]:
    """See that a folder has what readers take.

    Returns:
        a line for each reader

    Raises:
        ValueError: naming each rule that does not hold, with its source.
    """
    names = ("config", "preprocessor_config", "processor_config", "tokenizer_config")
    config, pictures, processor, tokens = (read_json(place / f"{name}.json", {}) for name in names)
    written = place / "chat_template.jinja"
    template = written.read_text(encoding="utf-8") if written.is_file() else ""
    weights = tuple(file.name for file in place.glob("*.safetensors"))
    folder = Folder(layout, config, pictures, processor, tokens, template, weights)
    faults, lines = [], []
    for reader in readers:
        odd = reader_faults(reader, folder)
        faults += [f"{reader}: {fault}" for fault in odd]
        count = len([rule for rule in RULES[reader] if not rule.layouts or layout in rule.layouts])
        lines.append(f"{reader}: {count} rules of its source hold")
        if reader == "llama_cpp" and (why := NOT_CONVERTED.get(layout)):
            lines[-1] += f"; its own converter makes no projector of this folder ({why}): use to=FILE.gguf"
    if faults:
        raise ValueError("the export failed its check:\n" + "\n".join(f"  {fault}" for fault in faults))
    return lines


def reader_faults(reader: str, folder: Folder) -> list[str]:
    """What a reader would refuse, or read otherwise than it was trained."""
    if reader == "llama_cpp" and (cannot := gguf_faults(folder.layout, dict(folder.config))):
        return cannot
    rules = [rule for rule in RULES[reader] if not rule.layouts or folder.layout in rule.layouts]
    faults = [f"asks for {rule.asks} ({rule.source})" for rule in rules if not rule.holds(folder)]
    return faults + (misread(dict(folder.config), folder.pictures) if reader == "llama_cpp" else [])
