"""Records of a chosen and a rejected answer, in every published form, and what is wrong with them by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_internvl.data.files.conversations import read_entry
from lightning_internvl.data.files.datasets import ChatsFile

ASKED, YES, NO = "is it red?", "yes, it is", "no"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}]


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


FORMS: dict[str, dict[str, Any]] = {
    "MMPR": {"image": "a.png", "question": f"<image>\n{ASKED}", "chosen": YES, "rejected": NO},
    "MMPR without a mark": {"image": ["a.png"], "question": ASKED, "chosen": YES, "rejected": NO},
    "trl, texts": {"images": ["a.png"], "prompt": ASKED, "chosen": YES, "rejected": NO},
    "trl, messages": {"images": ["a.png"], "prompt": MESSAGES, "chosen": [said(YES)], "rejected": [said(NO)]},
    "trl, prompt within": {"images": ["a.png"], "chosen": [*MESSAGES, said(YES)], "rejected": [*MESSAGES, said(NO)]},
    "trl, prompt within and apart": {
        "images": ["a.png"], "prompt": ASKED, "chosen": [said(ASKED, "user"), said(YES)],
        "rejected": [said(ASKED, "user"), said(NO)],
    },
    "LLaMA-Factory, sharegpt": {
        "images": ["a.png"], "conversations": [{"from": "human", "value": f"<image>{ASKED}"}],
        "chosen": {"from": "gpt", "value": YES}, "rejected": {"from": "gpt", "value": NO},
    },
    "LLaMA-Factory, alpaca": {"images": ["a.png"], "instruction": "is it", "input": "red?", "chosen": YES, "rejected": NO},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str) -> None:
    entry = read_entry(FORMS[form])
    question, answer = entry.messages
    assert question["content"].replace("<image>", "").split() == ASKED.split()
    assert question["content"].count("<image>") == 1
    assert (answer, entry.rejected, entry.images, entry.unread) == (said(YES), NO, ["a.png"], [])


def test_answers_before_the_last_are_read_and_not_learnt() -> None:
    talk = [said("<image>what is it?", "user"), said("a ball"), said(ASKED, "user")]
    entry = read_entry({"image": "a.png", "system": "be short", "messages": talk, "chosen": YES, "rejected": NO})
    assert [message["role"] for message in entry.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.get("learnt", True) for message in entry.messages if message["role"] == "assistant"] == [False, True]


BAD = {
    "equal": ({**FORMS["MMPR"], "rejected": f" {YES}\n"}, "the chosen answer equals the rejected one"),
    "no rejected": ({**FORMS["MMPR"], "rejected": None}, "it has 'chosen' and no 'rejected'"),
    "no chosen": ({"image": "a.png", "question": ASKED, "rejected": NO}, "it has 'rejected' and no 'chosen'"),
    "nothing asked": ({"image": "a.png", "chosen": YES, "rejected": NO}, "nothing is asked"),
    "other pictures": (
        {"chosen": [{"role": "user", "content": ASKED, "images": ["a.png"]}, said(YES)],
         "rejected": [{"role": "user", "content": ASKED, "images": ["b.png"]}, said(NO)]},
        "different pictures",
    ),
    "other question": (
        {"image": "a.png", "chosen": [said(ASKED, "user"), said(YES)], "rejected": [said("is it blue?", "user"), said(NO)]},
        "do not follow the same messages",
    ),
    "a mark in an answer": ({**FORMS["MMPR"], "rejected": "<image>"}, "answer 1 contains"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_faults_are_named_by_line_and_sample(fault: str, tmp_path: Path) -> None:
    record, wanted = BAD[fault]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (FORMS["MMPR"], {**record, "id": "seventh"})))
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)
    data = ChatsFile(file)
    assert data[0]["rejected"] == NO
    with pytest.raises(ValueError, match=wanted) as error:
        data[1]
    assert "line 2" in str(error.value)
    assert "seventh" in str(error.value)


def test_a_conversation_has_no_rejected_answer(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [said(ASKED, "user"), said(YES)]}) + "\n")
    assert "rejected" not in ChatsFile(file)[0]
