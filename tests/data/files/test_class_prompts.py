"""Prompts for zero-shot naming, and LLaVA's formats word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_internvl.data.files.class_prompts import prompt_sets, prompts
from lightning_internvl.data.templates import load_template

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
CHAT = [("user", "<image>\nWhat?"), ("assistant", "A cat."), ("user", "Where?"), ("assistant", "Here.")]


def test_imagenet_has_80_prompts() -> None:
    imagenet = prompt_sets()["imagenet"]
    assert len(set(imagenet)) == len(imagenet) == 80
    assert {"a bad photo of the {}.", "itap of my {}.", "the plushie {}.", "a {} in a video game."} <= set(imagenet)


def test_every_prompt_has_one_place_for_the_name() -> None:
    assert {"chinese", "japanese", "arabic", "italian"} <= set(prompt_sets())
    assert all(pattern.count("{}") == 1 for patterns in prompt_sets().values() for pattern in patterns)


def test_own_prompts(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text('["a {}", "my {c}"]')
    assert prompts(["big_cat"], str(file)) == [["a big cat", "my big cat"]]
    file.write_text('{cat: ["it purrs"], dog: ["it barks", "a {}"]}')
    assert prompts(["dog", "cat"], str(file)) == [["it barks", "a dog"], ["it purrs"]]
    for names, text, message in (
        (["cat", "cow"], "{cat: [a]}", "own.yaml: there are no prompts for the class 'cow' .1 of 2"),
        (["cat"], '["a {}", "cat"]', "the prompt 'cat' has no {}"),
        (["cat"], "7", "must hold a list of prompts"),
        (["cat"], "[", "is no YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            prompts(names, str(file))
    with pytest.raises(ValueError, match=r"nowhere.yaml: there is no such file"):
        prompts(["cat"], "nowhere.yaml")


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
