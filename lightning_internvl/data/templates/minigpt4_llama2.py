"""MiniGPT-4 with LLaMA 2, and MiniGPT-v2: "[INST] ... [/INST]", and <s> before every question (official `conversation.py`)."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import minigpt4

TEMPLATE = dataclasses.replace(
    minigpt4.TEMPLATE,
    name="minigpt4_llama2",
    user="<s>[INST] {}",
    assistant=" [/INST] ",
    answer_end=None,
    begins_with_bos=False,  # the first question brings it
)
