"""transformers' rendering of an exported chat template is the text that was trained on, character for character."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jinja2.exceptions import TemplateError
from published_prompts import FIRST, GIVEN, MIDDLE, OWN, PUBLISHED, UNUSED

from lightning_internvl.data.collate.encode import ImageTokens, encode_conversation, encode_prompt
from lightning_internvl.data.files.conversations import read_entry
from lightning_internvl.data.jinja_templates import jinja_of
from lightning_internvl.data.templates import IMAGE, VIDEO, Message, load_template, message_of, template_names
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.inference.predictor import as_sample

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


MARKS = [
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>",
    "<|endofchunk|>", "<|vision_start|>", "<|vision_end|>", "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>", *UNUSED,
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
WITH_MARKS = toy_tokenizer(MARKS)


def ids_of(name: str, messages: list[Message], listed: list[Any], text: str) -> dict[str, list[int]]:
    """A prompt as training (that is, before an answer), generation, the exported and the published template have it.

    Args:
        listed: the messages as transformers has them.
    """
    template = load_template(name)
    start, end = template.image_frame or ("", "")
    names, run = ImageTokens("<IMG_CONTEXT>", start or None, end or None), f"{start}<IMG_CONTEXT>{end}"
    given = (template, WITH_MARKS, [1], 5000, name, names)
    answered = encode_conversation([*messages, {"role": "assistant", "content": "Left"}], *given)[0]
    asked = encode_prompt(messages, *given)
    jinja = jinja_of(template, run)
    written = WITH_MARKS.apply_chat_template(listed, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    return {
        "training": answered[: len(asked)],
        "generation": asked,
        "exported": WITH_MARKS(written, add_special_tokens=False)["input_ids"],
        "published": WITH_MARKS(text.replace("@", run), add_special_tokens=False)["input_ids"],
    }


def test_every_system_has_published_prompts_here() -> None:
    of_captions_and_variants = {"blip2_caption", "blip2_t5_caption", "minigpt4_caption", "plain", "continuation", "qwen_marks"}
    language_models_alone = {"qwen2", "smollm2"}
    assert set(template_names()) - set(PUBLISHED) == of_captions_and_variants | language_models_alone


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_chat_evaluation_and_both_templates_make_the_same_ids(name: str) -> None:
    """For two questions after a picture, a given system message, and a picture within its question."""
    found, template = PUBLISHED[name], load_template(name)
    answered = {"role": "assistant", "content": "x"}
    own = OWN if found.questions == 2 else FIRST
    for asked, text in ((own, found.own), (GIVEN, found.given), (MIDDLE, found.middle)):
        if text is None:
            continue
        record = read_entry({"images": ["cat.png"] if asked is GIVEN else [], "messages": [*asked, answered]}).messages[:-1]
        ways = ids_of(name, record, asked, text)
        shown = {way: WITH_MARKS.decode(ids) for way, ids in ways.items()}
        assert shown == dict.fromkeys(ways, shown["published"])
        if "Assistant: A" not in text and "[/INST] A" not in text:  # MiniGPT-4 trains on answers that are tokenised apart
            assert all(ids == ways["published"] for ids in ways.values()), ways
        assert ids_of(name, [template.written(message) for message in record], asked, text) == ways  # as chat keeps them
    evaluated = as_sample([np.zeros((1, 1, 3), np.uint8)], "What is it?", "a")["conversation"]
    if found.questions == 1:
        assert ids_of(name, evaluated, FIRST, found.own)["generation"] == ways["published"]


@pytest.mark.parametrize("name", template_names())
def test_a_picture_without_a_mark_and_that_of_an_evaluation_stand_where_its_message_has_it(name: str) -> None:
    template = load_template(name, "")
    conversations = {
        "training": read_entry({"messages": [*FIRST, {"role": "assistant", "content": "Cat"}]}).messages[:1],
        "training, without marks": read_entry({"image": "cat.png", "question": "What is it?", "answer": "Cat"}).messages[:1],
        "chat": [template.written(message_of("user", [IMAGE, "What is it?"]))],
        "evaluation": as_sample([np.zeros((1, 1, 3), np.uint8)], "What is it?", "a")["conversation"],
    }
    names = ImageTokens("<IMG_CONTEXT>", None, None)
    ids = {way: encode_prompt(said, template, TOKENIZER, [3], 500, way, names) for way, said in conversations.items()}
    assert len({tuple(row) for row in ids.values()}) == 1, ids


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
