"""Prompts of MiniGPT-4 and XComposer as their code writes them, labels by marks, and rows joined of prompts and answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from continuations import joined, loss_over_length
from marked_labels import labels_by_ends, labels_by_turns

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer

CHAT = [
    {"role": "user", "content": "<image> what is it?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "left"},
]
TEXTS = {
    "minigpt4": "###Human: <Img><image></Img> what is it? ###Assistant: a cat###Human: where? ###Assistant: left###",
    "minigpt4_llama2": "<s>[INST] <Img><image></Img> what is it? [/INST] a cat</s><s>[INST] where? [/INST] left</s>",
    "minigpt4_caption": "<image>a cat\nleft\n",
    "xcomposer": " <|User|>:<image> what is it?\n<TOKENS_UNUSED_0> <|Bot|>:a cat<TOKENS_UNUSED_1>"
    " <|User|>:where?\n<TOKENS_UNUSED_0> <|Bot|>:left<TOKENS_UNUSED_1>",
    "xcomposer2": "[UNUSED_TOKEN_146]user\n<image> what is it?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    "a cat[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]user\nwhere?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    "left[UNUSED_TOKEN_145]\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_and_rows(name: str) -> None:
    template = load_template(name, system="")
    assert "".join(segment.text for segment in template.segments(CHAT, "</s>")) == TEXTS[name]
    marks = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>"]
    tokenizer = toy_tokenizer(marks)
    collator = ChatCollator(tokenizer, template, Squash(8), 3, 200)
    batch = collator([{"images": [np.zeros((8, 8, 3), np.uint8)], "conversation": CHAT, "key": "a"}])
    shown = tokenizer.decode(batch["input_ids"][0])
    assert shown.count("<IMG_CONTEXT>") == 3
    assert "<img>" not in shown
    first = "" if name == "minigpt4_llama2" else "<s>"
    assert shown == first + TEXTS[name].replace("<image>", "<IMG_CONTEXT>" * 3)
    learnt = tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    end = template.end("</s>")
    assert learnt == f"a cat{end}left{end}"


@pytest.mark.parametrize(
    ("name", "system", "beginning"),
    [
        ("minigpt4", None, "Give the following image: <Img>ImageContent</Img>. You will"),
        ("xcomposer", None, "meta instruction\nYou are an AI assistant whose name is 浦语.\n"),
        (
            "xcomposer2",
            None,
            "[UNUSED_TOKEN_146]system\nYou are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n- ",
        ),
        ("xcomposer2", "Be brief.", "[UNUSED_TOKEN_146]system\nBe brief.[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]user\n"),
    ],
)
def test_system_messages(name: str, system: str | None, beginning: str) -> None:
    assert load_template(name, system).segments(CHAT)[0].text.startswith(beginning)


def test_labels_by_turns() -> None:
    ids = torch.tensor([[8, 8, 92542, 1, 1, 1, 1, 1, 5, 6, 92542, 7, 7, 92542, 1, 1, 1, 1, 1, 4, 92542, 2, 2]])
    learnt = torch.where(labels_by_turns(ids) == -100, 0, 1)[0].tolist()
    assert learnt == [0] * 8 + [1] * 3 + [0] * 8 + [1, 1, 1, 0]
    cut = ids[:, :15]  # inside a question
    assert labels_by_turns(cut)[0, 11:].tolist() == [-100] * 4
    assert labels_by_turns(ids[:, :13])[0, 10:].tolist() == [92542, 7, -100]  # the original keeps one token more


def test_labels_by_ends() -> None:
    question, answer = 103027, 103028
    ids = torch.tensor([[8, question, 1, 1, 1, 1, 1, 5, 6, answer, 9, question, 1, 1, 1, 1, 1, 4, answer, 2, 2]])
    learnt = torch.where(labels_by_ends(ids) == -100, 0, 1)[0].tolist()
    assert learnt == [0] * 7 + [1] * 3 + [0] * 7 + [1, 1, 1, 0]
    assert labels_by_ends(ids[:, :11])[0].tolist()[7:] == [5, 6, answer, -100]


def test_joined_rows_and_their_losses() -> None:
    answers, mask = torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    rows = joined([[3], [3, 4, 4]], answers, mask, answers.masked_fill(mask == 0, -100), bos=1, pad=0)
    assert rows.input_ids.tolist() == [[1, 3, 5, 6, 0, 0, 0], [1, 3, 4, 4, 7, 8, 9]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert rows.labels.tolist() == [[-100, -100, 5, 6, -100, -100, -100], [-100] * 4 + [7, 8, 9]]
    logits = torch.randn(2, 7, 10)
    one = F.cross_entropy(logits[0, 1:3], torch.tensor([5, 6]), reduction="sum") / 6
    torch.testing.assert_close(loss_over_length(logits, rows.labels)[0], one)
