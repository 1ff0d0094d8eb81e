"""Flamingo's questions as OpenFlamingo writes them: a picture, "Question:", "Short answer:" and <|endofchunk|>, all in one line.

OpenFlamingo writes "Question:" between the picture and the text; here it stands in the text of the question, where data has it.
"""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates import flamingo

TEMPLATE = dataclasses.replace(flamingo.TEMPLATE, name="flamingo_vqa", assistant=" Short answer:")
