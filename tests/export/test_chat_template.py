"""transformers' rendering of an exported chat template is the text that was trained on, character for character."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jinja2.exceptions import TemplateError

from lightning_internvl.data.collate.encode import ImageTokens, encode_conversation, encode_prompt
from lightning_internvl.data.files.conversations import read_entry
from lightning_internvl.data.jinja_templates import jinja_of
from lightning_internvl.data.templates import IMAGE, VIDEO, Message, load_template, message_of, template_names
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.inference.predictor import _as_sample

RUN, FILM = "<img><IMG_CONTEXT></img>", "<film>"
TOKENIZER = toy_tokenizer()

ONE: list[Message] = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": 'A "cat" \\ {}.'}]
CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": ONE,
    "several turns": [*ONE, {"role": "user", "content": "Sure? {{ 1 }}"}, {"role": "assistant", "content": "Yes"}],
    "text alone": [{"role": "user", "content": " Name a colour. "}, {"role": "assistant", "content": "Red\nblue"}],
    "several pictures": [
        {"role": "user", "content": "<image>\n<image>\nCompare <image> with them."},
        {"role": "assistant", "content": "Alike"},
        {"role": "user", "content": "And now <image>?"},
        {"role": "assistant", "content": "No"},
    ],
    "a picture alone": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A dog"}],
    "a video": [{"role": "user", "content": "<video>\nWhat happens?"}, {"role": "assistant", "content": "It falls"}],
    "another system": [{"role": "system", "content": "Be brief. 请简短"}, *ONE],
}


def ours(name: str, conversation: list[Message], system: str | None) -> str:
    template = load_template(name, system)
    bos = TOKENIZER.bos_token if template.begins_with_bos else ""
    text = bos + "".join(segment.text for segment in template.segments(conversation, TOKENIZER.eos_token))
    return text.replace(IMAGE, RUN).replace(VIDEO, FILM)


def theirs(name: str, conversation: list[Any], system: str | None, prompt: bool = False) -> str:
    jinja = jinja_of(load_template(name, system), RUN, FILM)
    return TOKENIZER.apply_chat_template(conversation, chat_template=jinja, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("system", [None, "", "Answer in {} words."], ids=["own system", "no system", "given system"])
def test_the_text_is_that_of_training(name: str, system: str | None) -> None:
    for conversation in CONVERSATIONS.values():
        assert theirs(name, conversation, system) == ours(name, conversation, system)
        assert theirs(name, conversation[:-1], system, prompt=True) == ours(name, conversation[:-1], system)


def test_without_a_prompt_for_the_answer_the_turn_of_the_assistant_is_not_begun() -> None:
    assert theirs("vicuna", ONE[:1], "") + "ASSISTANT:" == theirs("vicuna", ONE[:1], "", prompt=True)


@pytest.mark.parametrize("name", template_names())
def test_lists_of_pictures_and_text_are_what_training_makes_of_them(name: str) -> None:
    picture, said = {"type": "image", "url": "cat.png"}, {"type": "text", "text": "Compare"}
    for content in ([picture, picture, said], [picture, said, picture], [said, picture, said]):
        listed = [{"role": "user", "content": content}, {"role": "assistant", "content": [{**said, "text": "Alike"}]}]
        assert theirs(name, listed, None) == ours(name, read_entry({"messages": listed}).messages, None)


# What the templates of these systems on the Hugging Face hub write for a picture, then a text
PUBLISHED = {
    "chatml": "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat?<|im_end|>\n<|im_start|>assistant\n",  # InternVL3-1B-hf
    "vicuna": "USER: <img><IMG_CONTEXT></img>\nWhat? ASSISTANT:",  # llava-1.5-7b-hf
    "qwen2_vl": "<|im_start|>user\n<img><IMG_CONTEXT></img>What?<|im_end|>\n<|im_start|>assistant\n",  # Qwen2-VL-2B-Instruct
}


@pytest.mark.parametrize("name", template_names())
def test_training_chat_evaluation_and_the_exported_template_read_one_text(name: str) -> None:
    picture, said = {"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}
    asked = [{"role": "user", "content": [picture, said]}]
    template = load_template(name, "")
    conversations = {
        "training": read_entry({"messages": [*asked, {"role": "assistant", "content": "Cat"}]}).messages,
        "training, without marks": read_entry({"image": "cat.png", "question": "What?", "answer": "Cat"}).messages,
        "chat": [template.written(message_of("user", [IMAGE, "What?"]))],
        "evaluation": _as_sample(np.zeros((1, 1, 3), np.uint8), "What?")["conversation"],
    }
    lengths, names = [3], ImageTokens("<IMG_CONTEXT>", None, None)
    ids = {way: encode_prompt(said[:1], template, TOKENIZER, lengths, 500, way, names) for way, said in conversations.items()}
    assert len({tuple(row) for row in ids.values()}) == 1, ids
    learnt, _ = encode_conversation(conversations["training"], template, TOKENIZER, lengths, 500, "training", names)
    assert learnt[: len(ids["chat"])] == ids["chat"]
    assert theirs(name, asked, "", prompt=True) == ours(name, conversations["chat"], "")
    if name in PUBLISHED:
        assert theirs(name, asked, "", prompt=True).removeprefix(TOKENIZER.bos_token) == PUBLISHED[name]


@pytest.mark.parametrize("roles", [["assistant"], ["user", "assistant", "assistant"], ["user", "system"]])
def test_roles_out_of_turn_are_refused(roles: list[str]) -> None:
    with pytest.raises(TemplateError, match="user and assistant in turn"):
        theirs("vicuna", [{"role": role, "content": "a"} for role in roles], None)


def test_messages_of_a_user_in_a_row_are_one_turn_each() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    begun = "<|im_start|>user\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    assert theirs("chatml", said, "") == begun
    assert theirs("chatml", said, "", prompt=True) == begun + "<|im_start|>assistant\n"
    answered = [*said, {"role": "assistant", "content": "c"}, said[0]]
    assert theirs("chatml", answered, "") == begun + "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\na<|im_end|>\n"


def test_a_processor_that_puts_pictures_in_by_itself_gets_none() -> None:
    text = TOKENIZER.apply_chat_template(ONE[:1], chat_template=jinja_of(load_template("blip2"), ""), tokenize=False)
    assert text == "</s>Question: What is it? Short answer:"
