"""InstructBLIP with Flan-T5: pictures and instruction, closed by </s>, are read; the answer and its </s> are written."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import blip2_t5

TEMPLATE = dataclasses.replace(blip2_t5.TEMPLATE, name="instructblip_t5", user="{}")
