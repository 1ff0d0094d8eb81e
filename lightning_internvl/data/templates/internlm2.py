"""InternLM2-Chat as InternVL 1.5 uses it: ChatML in one run, without line breaks after <|im_end|>, and a system message."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(
    name="internlm2",
    system="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
    system_format="<|im_start|>system\n{}<|im_end|>",
    user="<|im_start|>user\n{}<|im_end|>",
    assistant="<|im_start|>assistant\n",
    answer_end="<|im_end|>",
)
