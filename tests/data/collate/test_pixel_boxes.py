"""Boxes in pixels of the picture that the encoder sees: into rows, and back out of answers."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.collate.pixel_boxes import WHOLE, in_pixels, rescaled
from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.templates import IMAGE, VIDEO, load_template, message_of
from lightning_internvl.data.tokenizer import toy_tokenizer

NAMES = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
BOX, LIST = "<box>(250,500),(1000,750)</box>", "<box>[[250, 500, 1000, 750]]</box>"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_box_is_of_the_last_picture_before_it() -> None:
    found = in_pixels(
        [
            said("system", f"as in {BOX}"),
            said("user", f"{IMAGE}{BOX}{VIDEO}and {LIST}?"),
            said("assistant", f"(250,500) {BOX}"),
            message_of("user", [IMAGE, "here:", BOX]),
        ],
        [(28, 56), (112, 84)],
        [(40, 20)],
    )  # fmt: skip
    assert [message["content"] for message in found] == [
        "as in <box>(14,14),(56,21)</box>",
        f"{IMAGE}<box>(14,14),(56,21)</box>{VIDEO}and <box>[[5, 20, 20, 30]]</box>?",
        "(250,500) <box>(5,20),(20,30)</box>",
        f"{IMAGE}\nhere:<box>(21,56),(84,84)</box>",
    ]
    assert found[3]["parts"] == [IMAGE, "here:", "<box>(21,56),(84,84)</box>"]


def test_without_a_picture_they_stay() -> None:
    assert in_pixels([said("user", BOX)], [], []) == [said("user", BOX)]


@pytest.mark.parametrize("size", [(28, 2800), (1008, 1344), (1000, 1000)])
def test_back_and_forth_costs_less_than_a_pixel(size: tuple[int, int]) -> None:
    text = "<box>(3,500),(997,1000)</box>"
    back = rescaled(rescaled(text, WHOLE, size), size, WHOLE)
    found, true = ([int(number) for number in re.findall(r"\d+", one)] for one in (back, text))
    assert all(abs(a - b) <= 500 / side + 0.5 for a, b, side in zip(found, true, (size[1], size[0]) * 2, strict=True))


def collator(template: str) -> ChatCollator:
    start, end, image, video = NAMES
    processor = AnyResolution(112, min_pixels=784, frame_pixels=(784, 12544))
    return ChatCollator(toy_tokenizer(NAMES), load_template(template), processor, 16, 400, ImageTokens(image, start, end, video))


def test_rows_have_pixels_and_answers_thousandths() -> None:
    collate, plain = collator("qwen2_5_vl"), collator("qwen2_vl")
    image, film = np.zeros((56, 90, 3), np.uint8), np.zeros((4, 28, 56, 3), np.uint8)  # read at 56 x 84
    sample = {
        "images": [image], "videos": [], "key": "one",
        "conversation": [said("user", f"{IMAGE}where?"), said("assistant", f"at {BOX}")],
    }  # fmt: skip
    assert "at <box>(21,28),(84,42)</box>" in collate.tokenizer.decode(collate([sample])["input_ids"][0])
    assert f"at {BOX}" in plain.tokenizer.decode(plain([sample])["input_ids"][0])
    assert collate.said("at <box>(21,28),(84,42)</box>", sample) == f"at {BOX}"
    assert plain.said("at <box>(21,28),(84,42)</box>", sample) == "at <box>(21,28),(84,42)</box>"
    filmed = sample | {"videos": [(film, 2.0)], "conversation": [said("user", f"{IMAGE}{VIDEO}where?")]}
    assert collate.said("<box>(14,14),(56,21)</box>", filmed) == BOX
    assert collate.said("<box>(14,14)", filmed, finished=False) == "<box>(14,14)"
    alone = sample | {"images": [], "conversation": [said("user", "where?")]}
    assert collate.said(BOX, alone) == BOX
    assert collate.check(sample) is None
