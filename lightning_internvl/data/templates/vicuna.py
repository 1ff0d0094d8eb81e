"""Vicuna v1.1: one line, "USER:" and "ASSISTANT:", separators " " and the end token."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(
    name="vicuna",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_format="{} ",
    user="USER: {} ",
    assistant="ASSISTANT:",
    answer_start=" ",  # with the answer, where tokenizers keep the space in front of a word
)
