"""No roles: the question, a space, the answer and the end of the text (the pre-training and multi-task stages of Qwen-VL)."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(name="continuation", user="{}", assistant="", answer_start=" ", begins_with_bos=False)
