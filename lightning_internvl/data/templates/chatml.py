"""ChatML: each message between <|im_start|> with its role and <|im_end|>."""

from __future__ import annotations

from lightning_internvl.data.templates.base import ChatTemplate

TEMPLATE = ChatTemplate(
    name="chatml",
    system_format="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    answer_end="<|im_end|>",
    after_answer="\n",
    begins_with_bos=False,
)
