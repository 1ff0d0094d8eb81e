"""Flamingo as OpenFlamingo trains it: each picture with its text, closed by <|endofchunk|>.

OpenFlamingo writes "Question:" between the picture and the text; here it stands in the text of the
question, where data has it.
"""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates.base import ChatTemplate

_TEXT = ChatTemplate(name="flamingo", user="{}", assistant="", answer_end="<|endofchunk|>", image_frame=None, joint="")
_QUESTION = dataclasses.replace(_TEXT, name="flamingo_vqa", assistant=" Short answer:")

TEMPLATES = (_TEXT, _QUESTION)
