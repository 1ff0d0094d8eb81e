"""InternVL-Chat 1.1 to 3.5, by the names that `template` of their `config.json` has (official
`conversation.py`; `vicuna_v1.1` and `internlm2-chat` are `vicuna` and `internlm2` here)."""

from __future__ import annotations

import dataclasses

from lightning_internvl.data.templates.base import ChatTemplate
from lightning_internvl.data.templates.chatml import CHATML, INTERNLM2

_WRITER = "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
_INTERNVL2_5 = dataclasses.replace(CHATML, name="internvl2_5", system=f"你是书生·万象，英文名是InternVL，{_WRITER}")
# Over InternLM 2.5 and 3, whose tokenizers put <s> before every text
_OVER_INTERNLM = dataclasses.replace(_INTERNVL2_5, name="internvl2_5_internlm", begins_with_bos=True)
_HERMES2 = dataclasses.replace(INTERNLM2, name="Hermes-2", begins_with_bos=False)
_PHI3 = ChatTemplate(
    name="phi3-chat",
    system=INTERNLM2.system,
    system_format="<|system|>\n{}<|end|>",
    user="<|user|>\n{}<|end|>",
    assistant="<|assistant|>\n",
    answer_end="<|end|>",
)
# The space behind its system message stays where there is none.
_ZH = ChatTemplate(
    name="internvl_zh",
    system_format="{} ",
    bare_system=True,
    user="<human>: {} ",
    assistant="<bot>:",
    answer_start=" ",
)
_GPT_OSS = ChatTemplate(
    name="internvl3_5_gpt_oss",
    system="You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must be included for every message.",
    system_format="<|start|>system<|message|>{}<|end|>",
    user="<|start|>user<|message|>{}<|end|>",
    assistant="<|start|>assistant",
    answer_start="<|channel|>final<|message|>",
    answer_end="<|return|>",
    earlier_end="<|end|>",
    begins_with_bos=False,
)

TEMPLATES = (_INTERNVL2_5, _OVER_INTERNLM, _HERMES2, _PHI3, _ZH, _GPT_OSS)
