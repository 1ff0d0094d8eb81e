"""Formats without roles: a picture or question, and the text that follows it."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATES = (
    # A picture and its caption on one line; for training a connector on captions.
    ChatTemplate(name="plain", user="{}", assistant="", answer_end="\n", keep_user_text=False),
    # The question, a space, the answer and the end of the text: Qwen-VL's pre-training and
    # multi-task stages.
    ChatTemplate(name="continuation", user="{}", assistant="", answer_start=" ", begins_with_bos=False),
)
