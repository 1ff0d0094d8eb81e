"""BLIP-2 with OPT, second stage: the picture, then </s> as the beginning, the caption and a line break; no question."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import blip2

TEMPLATE = dataclasses.replace(blip2.TEMPLATE, name="blip2_caption", user="{}", answer_start="", keep_user_text=False)
