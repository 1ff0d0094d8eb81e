"""BLIP-2 and InstructBLIP, with OPT or Vicuna and with Flan-T5 (LAVIS `blip2_opt.py`,
`blip2_t5.py`, `blip2_vicuna_instruct.py`).

Pictures come first. A decoder then reads </s> as the beginning of the text. Flan-T5's encoder reads
pictures and text, closed by </s>, and its decoder writes the answer and </s>.
"""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates.base import ChatTemplate

_QUESTION = ChatTemplate(
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
_QUESTION_T5 = dataclasses.replace(
    _QUESTION,
    name="blip2_t5",
    assistant="</s>",
    answer_start="",
    answer_end=None,
    image="<image>",
)
# Captions, without a question: the second stage of training. The published stage also shows
# Flan-T5's encoder the beginning of the caption (prefix language modelling); here the whole caption
# is written.
_CAPTION = dataclasses.replace(
    _QUESTION,
    name="blip2_caption",
    user="{}",
    answer_start="",
    keep_user_text=False,
)
_CAPTION_T5 = dataclasses.replace(
    _QUESTION_T5,
    name="blip2_t5_caption",
    user="{}",
    keep_user_text=False,
)
_INSTRUCTION = dataclasses.replace(_QUESTION, name="instructblip", user="{}", answer_end=None)
_INSTRUCTION_T5 = dataclasses.replace(_QUESTION_T5, name="instructblip_t5", user="{}")

TEMPLATES = (_QUESTION, _QUESTION_T5, _CAPTION, _CAPTION_T5, _INSTRUCTION, _INSTRUCTION_T5)
