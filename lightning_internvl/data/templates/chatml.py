"""ChatML: each message between <|im_start|> with its role and <|im_end|>; and the systems that use
it with a system message or picture tokens of their own."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates.base import ChatTemplate

CHATML = ChatTemplate(
    name="chatml",
    system_format="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    answer_end="<|im_end|>",
    after_answer="\n",
    begins_with_bos=False,
)
_QWEN2 = dataclasses.replace(CHATML, name="qwen2", system="You are a helpful assistant.")
_QWEN2_VL = dataclasses.replace(_QWEN2, name="qwen2_vl", image_frame=("<|vision_start|>", "<|vision_end|>"), joint="")
_QWEN2_5_VL = dataclasses.replace(_QWEN2_VL, name="qwen2_5_vl", pixel_boxes=True)
_QWEN3_VL = dataclasses.replace(_QWEN2_VL, name="qwen3_vl", system="", timestamps=True)
_SMOLLM2 = dataclasses.replace(
    CHATML,
    name="smollm2",
    system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
# As InternVL 1.5 uses InternLM2-Chat: in one run, without line breaks after <|im_end|>.
INTERNLM2 = ChatTemplate(
    name="internlm2",
    system="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
    system_format="<|im_start|>system\n{}<|im_end|>",
    user="<|im_start|>user\n{}<|im_end|>",
    assistant="<|im_start|>assistant\n",
    answer_end="<|im_end|>",
)

TEMPLATES = (CHATML, _QWEN2, _QWEN2_VL, _QWEN2_5_VL, _QWEN3_VL, _SMOLLM2, INTERNLM2)
