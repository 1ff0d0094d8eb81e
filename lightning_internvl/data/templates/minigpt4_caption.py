"""MiniGPT-4's first stage: the visual tokens and a caption, no words around them (official `minigpt4_stage1_pretrain.yaml`)."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(name="minigpt4_caption", user="{}", assistant="", answer_end="\n", keep_user_text=False, image_frame=None)
