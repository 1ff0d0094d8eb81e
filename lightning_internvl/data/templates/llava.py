"""LLaVA and Vicuna (official `conversation.py`). LLaVA 1.5 is `vicuna`, and LLaVA-NeXT too, or by its
language model `mistral` or `llava_llama_3`."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates.base import ChatTemplate

# "Human:" and "Assistant:", everything ends with "###".
_LLAVA_V0 = ChatTemplate(
    name="llava_v0",
    system="A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    system_format="{}###",
    user="Human: {}###",
    assistant="Assistant:",
    answer_start=" ",
    answer_end="###",
    parts_last=True,
)
# Vicuna v1.1: one line, "USER:" and "ASSISTANT:", separators " " and the end token.
_VICUNA = ChatTemplate(
    name="vicuna",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_format="{} ",
    user="USER: {} ",
    assistant="ASSISTANT:",
    answer_start=" ",  # with the answer, where tokenizers keep the space in front of a word
    parts_last=True,
)
_LLAVA_V1 = dataclasses.replace(_VICUNA, name="llava_v1", system=_LLAVA_V0.system)

_MISTRAL = ChatTemplate(
    name="mistral",
    system_format="<<SYS>>\n{}\n<</SYS>>\n\n",
    user="[INST] {} [/INST]",
    assistant="",
    answer_start=" ",
    parts_last=True,
)
_LLAMA_3 = ChatTemplate(
    name="llava_llama_3",
    system="You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.",
    system_format="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer_end="<|eot_id|>",
    parts_last=True,
)

TEMPLATES = (_LLAVA_V0, _LLAVA_V1, _VICUNA, _MISTRAL, _LLAMA_3)
