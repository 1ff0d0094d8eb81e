"""Qwen-VL-Chat as its fine-tuning script learns it: the marks at the beginning and end of all turns too."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import qwen

TEMPLATE = dataclasses.replace(qwen.TEMPLATE, name="qwen_marks", learn_marks=True)
