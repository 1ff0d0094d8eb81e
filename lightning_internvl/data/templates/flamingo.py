"""Flamingo as OpenFlamingo trains and asks it (`train/data.py`, `eval/models/open_flamingo.py`): each
picture with its text, closed by <|endofchunk|>; MPT's tokenizer begins no text by a token."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates.base import ChatTemplate

_TEXT = ChatTemplate(
    name="flamingo",
    user="{}",
    assistant="",
    answer_end="<|endofchunk|>",
    begins_with_bos=False,
    image_frame=None,
    joint="",
)
_QUESTION = dataclasses.replace(
    _TEXT,
    name="flamingo_vqa",
    user="Question:{}",
    assistant=" Short answer:",
    images_first=True,
)

TEMPLATES = (_TEXT, _QUESTION)
