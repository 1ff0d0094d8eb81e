"""SmolLM2: ChatML with its own system message."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import chatml

TEMPLATE = dataclasses.replace(
    chatml.TEMPLATE, name="smollm2", system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
