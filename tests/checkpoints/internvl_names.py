"""The published unquantised names of InternVL, by what their files hold: layout, tower, language model, tokenizer, chat format.

Names: the model tables of github.com/OpenGVLab/InternVL (README.md, internvl_chat/shell/mini_internvl/README.md) and of the
3.5 model cards; further training stages and -hf folders as ms-swift lists them (swift/model/models/internlm.py). Language
models and towers: the same tables; `template`, ps_version and select_layer: the fine-tuning scripts below internvl_chat/shell.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Names whose files have the same structure.

    `template` is the field of `config.json`; `chat` the format here; `system` how its message begins.
    """

    names: tuple[str, ...]
    layout: str
    tower: str
    language: str
    tokenizer: str
    template: str | None
    chat: str
    system: str = ""
    top: tuple[tuple[str, Any], ...] = ()


def _names(text: str, *sizes: str) -> tuple[str, ...]:
    """`{}` for each size, for each word of the text."""
    return tuple(word.format(size) for word in text.split() for size in sizes)


FIRST, LATER, OSS = "你是由上海人工智能实验室联合商汤科技", "你是书生·万象", "You are InternVL"
V1_1 = (("ps_version", "v1"), ("select_layer", -4), ("dynamic_image_size", False))
V1_2 = (("ps_version", "v1"), ("dynamic_image_size", False))
TWO_5 = "InternVL2_5-{} InternVL2_5-{}-MPO"
THREE = "InternVL3-{}-Pretrained InternVL3-{}-Instruct InternVL3-{}"
THREE_5 = "InternVL3_5-{}-Pretrained InternVL3_5-{}-Instruct InternVL3_5-{}-MPO InternVL3_5-{}"
DOMAINS = "Mini-InternVL2-{}-DA-Drivelm Mini-InternVL2-{}-DA-BDD Mini-InternVL2-{}-DA-RS Mini-InternVL2-{}-DA-Medical"
CHAT, NATIVE = "internvl_chat", "internvl_native"
_QWEN2 = ("qwen2", "vocab.json", "internvl2_5", "internvl2_5", LATER)
_QWEN3 = ("vocab.json", "internvl2_5", "internvl2_5", LATER)
_INTERNLM2 = ("internlm2", "InternLM2", "internlm2-chat", "internlm2", FIRST)
_INTERNLM2_5 = ("internlm2", "InternLM2", "internvl2_5", "internvl2_5_internlm", LATER)
_PLAIN = ("tokenizer.json", None, "chatml", "")

KINDS: tuple[Kind, ...] = (
    Kind(_names("InternVL-Chat-ViT-6B-Vicuna-{}", "7B", "13B"), "internvl_chat_llava", "6B", "llama", "LLaMA", None, "vicuna",
         "A chat between"),
    Kind(("InternVL-Chat-V1-1",), CHAT, "6B", "llama", "LLaMA", "internvl_zh", "internvl_zh", "", V1_1),
    Kind(("InternVL-Chat-V1-2", "InternVL-Chat-V1-2-Plus"), CHAT, "6B", "llama", "LLaMA", "Hermes-2", "Hermes-2", FIRST, V1_2),
    Kind(("InternVL2-40B",), CHAT, "6B", "llama", "LLaMA", "Hermes-2", "Hermes-2", FIRST),
    Kind(("InternVL2-Llama3-76B",), CHAT, "6B", "llama", "tokenizer.json", "internlm2-chat", "internlm2", FIRST),
    Kind(("InternVL-Chat-V1-5", "InternVL2-26B"), CHAT, "6B", *_INTERNLM2),
    Kind(("Mini-InternVL-Chat-2B-V1-5", "InternVL2-2B", "InternVL2-8B", "InternVL2-8B-MPO", *_names(DOMAINS, "2B")),
         CHAT, "300M", *_INTERNLM2),
    Kind(("Mini-InternVL-Chat-4B-V1-5", "InternVL2-4B", *_names(DOMAINS, "4B")), CHAT, "300M", "phi3", "LLaMA", "phi3-chat",
         "phi3-chat", FIRST),
    Kind(("InternVL2-1B", *_names(DOMAINS, "1B")), CHAT, "300M", "qwen2", "vocab.json", "Hermes-2", "Hermes-2", FIRST),
    Kind(_names(TWO_5, "2B", "8B"), CHAT, "300M", *_INTERNLM2_5),
    Kind(_names(TWO_5, "26B"), CHAT, "6B", *_INTERNLM2_5),
    Kind((*_names(TWO_5, "1B", "4B"), *_names(THREE, "1B", "2B", "8B", "14B")), CHAT, "300M", *_QWEN2),
    Kind((*_names(TWO_5, "38B", "78B"), *_names(THREE, "38B", "78B")), CHAT, "6B", *_QWEN2),
    Kind(_names(THREE, "9B"), CHAT, "300M", "internlm3", "InternLM3", "internvl2_5", "internvl2_5_internlm", LATER),
    Kind(_names(THREE_5, "1B", "2B", "4B", "8B", "14B"), CHAT, "300M", "qwen3", *_QWEN3),
    Kind(_names(THREE_5, "38B"), CHAT, "6B", "qwen3", *_QWEN3),
    Kind(_names(THREE_5, "30B-A3B"), CHAT, "300M", "qwen3_moe", *_QWEN3),
    Kind(_names(THREE_5, "241B-A28B"), CHAT, "6B", "qwen3_moe", *_QWEN3),
    Kind(("InternVL3_5-GPT-OSS-20B-A4B-Preview",), CHAT, "300M", "gpt_oss", "tokenizer.json", "internvl3_5_gpt_oss",
         "internvl3_5_gpt_oss", OSS),
    Kind(_names("InternVL3-{}-hf", "1B", "2B", "8B", "14B"), NATIVE, "300M", "qwen2", *_PLAIN),
    Kind(_names("InternVL3-{}-hf", "38B", "78B"), NATIVE, "6B", "qwen2", *_PLAIN),
    Kind(("InternVL3-9B-hf",), NATIVE, "300M", "internlm3", "InternLM3", None, "internvl2_5_internlm"),
    Kind(_names("InternVL3_5-{}-HF", "1B", "2B", "4B", "8B", "14B"), NATIVE, "300M", "qwen3", *_PLAIN),
    Kind(("InternVL3_5-38B-HF",), NATIVE, "6B", "qwen3", *_PLAIN),
    Kind(("InternVL3_5-30B-A3B-HF",), NATIVE, "300M", "qwen3_moe", *_PLAIN),
    Kind(("InternVL3_5-241B-A28B-HF",), NATIVE, "6B", "qwen3_moe", *_PLAIN),
    Kind(("InternVL3_5-GPT-OSS-20B-A4B-Preview-HF",), NATIVE, "300M", "gpt_oss", "tokenizer.json", None, "internvl3_5_gpt_oss",
         OSS),
)  # fmt: skip
NAMES = tuple(name for kind in KINDS for name in kind.names)
# Towers alone: no tokenizer, nothing to say.
TOWERS = {
    "300M": ("InternViT-300M-448px", "InternViT-300M-448px-V2_5"),
    "6B": (
        "InternViT-6B-224px", "InternViT-6B-448px-V1-0", "InternViT-6B-448px-V1-2", "InternViT-6B-448px-V1-5",
        "InternViT-6B-448px-V2_5",
    ),
}  # fmt: skip
