"""InstructBLIP: pictures, </s> as the beginning, the instruction, the answer and </s> (LAVIS `blip2_vicuna_instruct.py`)."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import blip2

TEMPLATE = dataclasses.replace(blip2.TEMPLATE, name="instructblip", user="{}", answer_end=None)
