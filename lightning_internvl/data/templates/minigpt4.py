"""MiniGPT-4 with Vicuna v0: "###Human:" and "###Assistant:", answers end with "###" (official `minigpt4_stage2_finetune.yaml`).

The system message belongs to the chat, not to training, which leaves it out: `system: ""`.
"""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(
    name="minigpt4",
    system="Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions.",
    system_format="{}",
    user="###Human: {} ",
    assistant="###Assistant: ",
    answer_end="###",
    image="<Img><image></Img>",
    image_frame=None,
)
