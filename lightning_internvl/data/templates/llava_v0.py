"""LLaVA's first format: "Human:" and "Assistant:", everything ends with "###" (official `conversation.py`, `llava_v0`)."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(
    name="llava_v0",
    system="A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    system_format="{}###",
    user="Human: {}###",
    assistant="Assistant:",
    answer_start=" ",
    answer_end="###",
)
