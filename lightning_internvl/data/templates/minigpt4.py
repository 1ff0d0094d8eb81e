"""MiniGPT-4 and MiniGPT-v2 (official `conversation.py`, `minigpt4_stage1_pretrain.yaml` and
`minigpt4_stage2_finetune.yaml`).

The system message belongs to the chat, not to training, which leaves it out: `system: ""`.
"""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates.base import ChatTemplate

# With Vicuna v0: "###Human:" and "###Assistant:", and "###" ends an answer, which begins the next
# question too.
_VICUNA = ChatTemplate(
    name="minigpt4",
    system="Give the following image: <Img>ImageContent</Img>. You will be able to see the image once "
    "I provide it to you. Please answer my questions.",
    system_format="{}###",
    bare_system=True,
    user="Human: {} ",
    assistant="###Assistant: ",
    answer_end="###",
    image="<Img><image></Img>",
    image_frame=None,
    joint=" ",
)
# With LLaMA 2, and MiniGPT-v2: "[INST] ... [/INST]", and <s> before every question.
_LLAMA2 = dataclasses.replace(
    _VICUNA,
    name="minigpt4_llama2",
    system_format="{}",
    bare_system=False,
    user="<s>[INST] {}",
    assistant=" [/INST] ",
    answer_end=None,
    begins_with_bos=False,  # the first question brings it
)
# The first stage: the visual tokens and a caption, no words around them.
_CAPTION = ChatTemplate(
    name="minigpt4_caption",
    user="{}",
    assistant="",
    answer_end="\n",
    keep_user_text=False,
    image_frame=None,
)

TEMPLATES = (_VICUNA, _LLAMA2, _CAPTION)
