"""Exact text of InternVL's conversations, by the names in its published `config.json` (official `conversation.py`)."""

from __future__ import annotations

import pytest

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.collate.encode import encode_conversation, encode_prompt
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer

FIRST = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
LATER = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
OSS = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must be included for every message."
)
TURNS = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A cat"},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Left"},
]
# The prompt after both questions; what ends the last answer.
PROMPTS = {
    "internvl2_5": (
        f"<|im_start|>system\n{LATER}<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Hermes-2": (
        f"<|im_start|>system\n{FIRST}<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\nA cat<|im_end|><|im_start|>user\nWhere?<|im_end|><|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "phi3-chat": (
        f"<s><|system|>\n{FIRST}<|end|><|user|>\n<image>\nWhat is it?<|end|>"
        "<|assistant|>\nA cat<|end|><|user|>\nWhere?<|end|><|assistant|>\n",
        "<|end|>",
    ),
    "internvl_zh": ("<s> <human>: <image>\nWhat is it? <bot>: A cat</s><human>: Where? <bot>:", "</s>"),
    "internvl3_5_gpt_oss": (
        f"<|start|>system<|message|>{OSS}<|end|><|start|>user<|message|><image>\nWhat is it?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>A cat<|end|><|start|>user<|message|>Where?<|end|><|start|>assistant",
        "<|return|>",
    ),
}
PROMPTS["internlm2"] = (f"<s>{PROMPTS['Hermes-2'][0]}", "<|im_end|>")
PROMPTS["internvl2_5_internlm"] = (f"<s>{PROMPTS['internvl2_5'][0]}", "<|im_end|>")
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>"]
TOKENIZER = toy_tokenizer(MARKS)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_published_text(name: str) -> None:
    text, end = PROMPTS[name]
    text, template = text.replace("<image>", "<img><IMG_CONTEXT></img>"), load_template(name)
    assert TOKENIZER.decode(encode_prompt(TURNS[:3], template, TOKENIZER, [1], 1000, "s")) == text
    ids, labels = encode_conversation(TURNS, template, TOKENIZER, [1], 1000, "s")
    before = "" if template.assistant.endswith("\n") else "<|channel|>final<|message|>" if "oss" in name else " "
    assert TOKENIZER.decode(ids) == f"{text}{before}Left{end}{template.after_answer}"
    learnt = TOKENIZER.decode([label for label in labels if label != IGNORE_INDEX])
    earlier = template.earlier_end or end
    assert (learnt, template.end("</s>")) == (f"{before}A cat{earlier}{before}Left{end}", end)


def test_another_system_message() -> None:
    said = "".join(segment.text for segment in load_template("internvl_zh", "Be brief.").segments(TURNS[:1]))
    assert said == "Be brief. <human>: <image>\nWhat is it? <bot>:"
    assert load_template("internvl2_5", "").segments(TURNS[:1])[0].text.startswith("<|im_start|>user\n")


def test_the_channel_of_an_answer_is_not_shown() -> None:
    ids = TOKENIZER.encode("<|channel|>final<|message|>A cat<|return|>", add_special_tokens=False)
    assert load_template("internvl3_5_gpt_oss").said(TOKENIZER.decode(ids, skip_special_tokens=True)) == "A cat"
    assert load_template("internvl_zh").said("final") == "final"
