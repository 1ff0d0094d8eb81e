"""Prompts for zero-shot naming, and LLaVA's formats word for word."""

from __future__ import annotations

import pytest

from lightning_internvl.data.prompts import IMAGENET, prompts
from lightning_internvl.data.templates import load_template

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
CHAT = [("user", "<image>\nWhat?"), ("assistant", "A cat."), ("user", "Where?"), ("assistant", "Here.")]


def test_imagenet_has_80_prompts() -> None:
    assert len(set(IMAGENET)) == len(IMAGENET) == 80
    assert {"a bad photo of the {}.", "itap of my {}.", "the plushie {}.", "a {} in a video game."} <= set(IMAGENET)
    assert all(pattern.count("{}") == 1 and "*" not in pattern for pattern in IMAGENET)


def test_classes_are_named_in_every_prompt() -> None:
    assert prompts(["golden_retriever", "cat"], "plain") == [["a photo of a golden retriever."], ["a photo of a cat."]]
    assert prompts(["猫"], "chinese")[0][0] == "一张猫的照片。"
    with pytest.raises(ValueError, match="prompts 'none' are not known; valid choices: imagenet, plain, chinese"):
        prompts(["cat"], "none")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava_v0", f"{HUMAN}###Human: <image>\nWhat?###Assistant: A cat.###Human: Where?###Assistant: Here.###"),
        ("llava_v1", f"{HUMAN} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT: Here.</s>"),
        ("plain", "<image>A cat.\nHere.\n"),
    ],
)
def test_formats_of_llava(name: str, text: str) -> None:
    conversation = [{"role": role, "content": content} for role, content in CHAT]
    segments = load_template(name).segments(conversation)
    assert "".join(segment.text for segment in segments) == text
    answers = [segment.text.strip() for segment in segments if segment.is_answer]
    assert [answer[:4] for answer in answers] == ["A ca", "Here"]
