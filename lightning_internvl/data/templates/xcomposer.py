"""InternLM-XComposer 1 and 2 (official `modeling_InternLM_XComposer.py`,
`modeling_internlm_xcomposer2.py`).

No special tokens stand around the visual tokens; in the first version they come with learned flags.
"""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

# " <|User|>:" and " <|Bot|>:"; <TOKENS_UNUSED_0> ends a question, <TOKENS_UNUSED_1> an answer.
_FIRST = ChatTemplate(
    name="xcomposer",
    system="meta instruction\nYou are an AI assistant whose name is 浦语.\n"
    "- 浦语 is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n- 浦语 can understand and "
    "communicate fluently in the language chosen by the user such as English and "
    "中文.\nconversation\n",
    user=" <|User|>:{}\n<TOKENS_UNUSED_0>",
    assistant=" <|Bot|>:",
    answer_end="<TOKENS_UNUSED_1>",
    image_frame=None,
    joint="",
)
_NAME = "InternLM-XComposer (浦语·灵笔)"
# ChatML with the marks [UNUSED_TOKEN_146] and [UNUSED_TOKEN_145].
_SECOND = ChatTemplate(
    name="xcomposer2",
    system=f"You are an AI assistant whose name is {_NAME}.\n"
    f"- {_NAME} is a multi-modality conversational language model that is developed by Shanghai AI "
    "Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    f"- {_NAME} can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文.\n"
    f"- {_NAME} is capable of comprehending and articulating responses effectively based on the "
    "provided image.",
    system_format="[UNUSED_TOKEN_146]system\n{}[UNUSED_TOKEN_145]\n",
    user="[UNUSED_TOKEN_146]user\n{}[UNUSED_TOKEN_145]\n",
    assistant="[UNUSED_TOKEN_146]assistant\n",
    answer_end="[UNUSED_TOKEN_145]",
    after_answer="\n",
    image_frame=None,
    joint="",
)

TEMPLATES = (_FIRST, _SECOND)
