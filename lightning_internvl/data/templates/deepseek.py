"""DeepSeek-VL: "User:", a blank line, "Assistant:", and the end token after answers."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

_TEMPLATE = ChatTemplate(
    name="deepseek",
    system="You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural language.",
    system_format="{}\n\n",
    user="User: {}\n\n",
    assistant="Assistant:",
    answer_start=" ",  # with the answer, where tokenizers keep the space in front of a word
    image_frame=None,
    joint="",
)

TEMPLATES = (_TEMPLATE,)
