"""BLIP-2 with Flan-T5, questions: pictures and question, closed by </s>, are read; the answer and its </s> are written."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import blip2

TEMPLATE = dataclasses.replace(
    blip2.TEMPLATE, name="blip2_t5", assistant="</s>", answer_start="", answer_end=None, image="<image>"
)
