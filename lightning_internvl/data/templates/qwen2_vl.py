"""Qwen2-VL: the format of Qwen2, pictures and videos between <|vision_start|> and <|vision_end|>."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import qwen2

TEMPLATE = dataclasses.replace(qwen2.TEMPLATE, name="qwen2_vl", image_frame=("<|vision_start|>", "<|vision_end|>"))
