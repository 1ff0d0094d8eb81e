"""Flamingo as OpenFlamingo trains it: a picture and its text, closed by <|endofchunk|>, then the next picture."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(name="flamingo", user="{}", assistant="", answer_end="<|endofchunk|>", image_frame=None)
