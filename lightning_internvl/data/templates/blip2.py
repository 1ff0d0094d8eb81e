"""BLIP-2 with OPT, questions: the pictures, then </s> as the beginning, "Question: ... Short answer:", the answer and a line
break (LAVIS `blip2_opt.py`)."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(
    name="blip2",
    user="Question: {} Short answer:",
    assistant="",
    answer_start=" ",
    answer_end="\n",
    begins_with_bos=False,  # the pictures bring it
    image="<image></s>",
    image_frame=None,
    images_first=True,
)
