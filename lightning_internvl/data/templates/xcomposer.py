"""InternLM-XComposer 1: " <|User|>:" and " <|Bot|>:"; <TOKENS_UNUSED_0> ends a question, <TOKENS_UNUSED_1> an answer.

The visual tokens come with learned flags, so no special tokens stand around them (official `modeling_InternLM_XComposer.py`).
"""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(
    name="xcomposer",
    system="meta instruction\nYou are an AI assistant whose name is 浦语.\n"
    "- 浦语 is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- 浦语 can understand and communicate fluently in the language chosen by the user such as English and 中文.\nconversation\n",
    user=" <|User|>:{}\n<TOKENS_UNUSED_0>",
    assistant=" <|Bot|>:",
    answer_end="<TOKENS_UNUSED_1>",
    image_frame=None,
)
