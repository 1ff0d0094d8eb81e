"""Exact text of Qwen-VL's and DeepSeek-VL's conversations, and what of it is learnt."""

from __future__ import annotations

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.collate.encode import ImageTokens, encode_conversation, encode_prompt
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer

TOKENIZER = toy_tokenizer()
TURNS = [
    {"role": "user", "content": "<image>\n<image>is there a cat?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and here? <image>"},
    {"role": "assistant", "content": "no"},
]
RUN = "<img><IMG_CONTEXT></img>"
QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\nPicture 1: {RUN}\nPicture 2: {RUN}\nis there a cat?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    f"<|im_start|>user\nand here? Picture 3: {RUN}\n<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
)


def encoded(name: str, frame: tuple[str, str] | None = ("<img>", "</img>")) -> tuple[list[int], list[int]]:
    tokens = ImageTokens(start=frame and frame[0], end=frame and frame[1])
    return encode_conversation(TURNS, load_template(name), TOKENIZER, [1, 1, 1], 1000, "s", tokens)


def learnt(labels: list[int]) -> list[str]:
    """Runs of labels as text."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(label)
    return [TOKENIZER.decode(run) for run in runs if run]


def test_pictures_are_numbered() -> None:
    for name in ("qwen", "qwen_marks"):
        assert TOKENIZER.decode(encoded(name)[0]) == QWEN
    prompt = encode_prompt(TURNS[:3], load_template("qwen"), TOKENIZER, [1, 1, 1], 1000, "s")
    assert TOKENIZER.decode(prompt) == QWEN.removesuffix("no<|im_end|>\n")


def test_what_is_learnt_with_and_without_marks() -> None:
    assert learnt(encoded("qwen")[1]) == ["yes<|im_end|>", "no<|im_end|>"]
    assert learnt(encoded("qwen_marks")[1]) == [
        "<|im_start|>", "<|im_end|>\n<|im_start|>", "<|im_end|>\n<|im_start|>", "yes<|im_end|>\n<|im_start|>",
        "<|im_end|>\n<|im_start|>", "no<|im_end|>\n",
    ]  # fmt: skip


def test_deepseek() -> None:
    template = load_template("deepseek")
    assert template.image_frame is None
    text = TOKENIZER.decode(encoded("deepseek", None)[0])
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    )
    assert text == (
        f"<s>{system}\n\nUser: <IMG_CONTEXT>\n<IMG_CONTEXT>is there a cat?\n\nAssistant: yes</s>"
        "User: and here? <IMG_CONTEXT>\n\nAssistant: no</s>"
    )
    assert learnt(encoded("deepseek", None)[1]) == [" yes</s>", " no</s>"]


def test_continuation() -> None:
    assert TOKENIZER.decode(encoded("continuation")[0]) == f"{RUN}\n{RUN}is there a cat? yes</s>and here? {RUN} no</s>"
