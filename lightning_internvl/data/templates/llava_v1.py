"""LLaVA v1: Vicuna's format with the system message of LLaVA (official `conversation.py`, `llava_v1`). LLaVA 1.5 is `vicuna`."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import llava_v0, vicuna

TEMPLATE = dataclasses.replace(vicuna.TEMPLATE, name="llava_v1", system=llava_v0.TEMPLATE.system)
