"""BLIP-2 with Flan-T5, second stage: the picture is read, the caption and </s> are written.

The published stage also shows the encoder the beginning of the caption (prefix language modelling); here the whole caption is
written.
"""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import blip2_t5

TEMPLATE = dataclasses.replace(blip2_t5.TEMPLATE, name="blip2_t5_caption", user="{}", keep_user_text=False)
