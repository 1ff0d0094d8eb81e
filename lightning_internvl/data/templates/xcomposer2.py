"""InternLM-XComposer2: ChatML with the marks [UNUSED_TOKEN_146] and [UNUSED_TOKEN_145], and nothing around the visual tokens
(official `modeling_internlm_xcomposer2.py`)."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

_NAME = "InternLM-XComposer (浦语·灵笔)"

TEMPLATE = ChatTemplate(
    name="xcomposer2",
    system=f"You are an AI assistant whose name is {_NAME}.\n"
    f"- {_NAME} is a multi-modality conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    f"- {_NAME} can understand and communicate fluently in the language chosen by the user such as English and 中文.\n"
    f"- {_NAME} is capable of comprehending and articulating responses effectively based on the provided image.",
    system_format="[UNUSED_TOKEN_146]system\n{}[UNUSED_TOKEN_145]\n",
    user="[UNUSED_TOKEN_146]user\n{}[UNUSED_TOKEN_145]\n",
    assistant="[UNUSED_TOKEN_146]assistant\n",
    answer_end="[UNUSED_TOKEN_145]",
    after_answer="\n",
    image_frame=None,
)
