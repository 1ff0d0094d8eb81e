"""Templates, labels and collators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.collate.base import pad_rows, stable_id
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens, encode_conversation, encode_prompt
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.processors.basic import Squash, Tiles
from lightning_internvl.data.processors.pixels import to_pixels
from lightning_internvl.data.scenes.datasets import SceneChats, ScenePairs
from lightning_internvl.data.templates import Message, load_template, template_names
from lightning_internvl.data.tokenizer import toy_tokenizer

TOKENIZER = toy_tokenizer()
CHATS = SceneChats(0, "train", caption_share=0.5)
SQUASH = Squash(64)
CONTEXT = TOKENIZER.convert_tokens_to_ids("<IMG_CONTEXT>")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


TWO_TURNS = [user("<image>\nis there a cat?"), assistant("yes"), user("where?"), assistant("top left")]


def answers_in(labels: list[int]) -> list[str]:
    """The runs of labels that are not ignored, decoded."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(label)
    return [TOKENIZER.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", sorted(set(template_names()) - {"qwen_marks"}))  # which also learns marks of turns
def test_labels_are_the_answers(name: str) -> None:
    template = load_template(name)
    end = template.end(TOKENIZER.eos_token)
    earlier = template.earlier_end or end
    for number in range(50):
        conversation = CHATS[number]["conversation"]
        ids, labels = encode_conversation(conversation, template, TOKENIZER, [4], 2000, "s")
        assert len(ids) == len(labels)
        assert all(label in (IGNORE_INDEX, i) for i, label in zip(ids, labels, strict=True))
        said = [m["content"] for m in conversation if m["role"] == "assistant"]
        answers = [template.answer_start + text + earlier for text in said[:-1]] + [template.answer_start + said[-1] + end]
        assert "".join(answers_in(labels)) == "".join(answers)
        if template.keep_user_text:
            assert answers_in(labels) == answers
            prompt = encode_prompt(conversation[:3], template, TOKENIZER, [4], 2000, "s")
            assert prompt == ids[: len(prompt)]
            assert labels[len(prompt)] == ids[len(prompt)]
            assert labels[len(prompt) - 1] == IGNORE_INDEX


def test_exact_text_of_each_format() -> None:
    def text(name: str, system: str | None = None) -> str:
        ids, _ = encode_conversation(TWO_TURNS, load_template(name, system), TOKENIZER, [2], 200, "s")
        return TOKENIZER.decode(ids)

    run = "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    assert text("vicuna", "Be kind.") == (
        f"<s>Be kind. USER: {run}\nis there a cat? ASSISTANT: yes</s>USER: where? ASSISTANT: top left</s>"
    )
    assert text("vicuna").startswith("<s>A chat between a curious user and an artificial intelligence assistant. The ")
    turns = (
        f"<|im_start|>user\n{run}\nis there a cat?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\ntop left<|im_end|>\n"
    )
    assert text("chatml") == turns
    assert text("chatml", "Be kind.") == "<|im_start|>system\nBe kind.<|im_end|>\n" + turns
    assert text("qwen2") == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + turns
    assert text("internlm2", "Be kind.") == (
        f"<s><|im_start|>system\nBe kind.<|im_end|><|im_start|>user\n{run}\nis there a cat?<|im_end|>"
        "<|im_start|>assistant\nyes<|im_end|><|im_start|>user\nwhere?<|im_end|><|im_start|>assistant\ntop left<|im_end|>"
    )
    assert "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型" in text("internlm2")
    assert text("plain") == f"<s>{run}yes\ntop left\n"


def test_template_errors() -> None:
    with pytest.raises(ValueError, match=r"'alpaca'.*'chatml', .*'vicuna'"):
        load_template("alpaca")
    chatml = load_template("chatml")
    with pytest.raises(ValueError, match="message 1 has role 'user'"):
        chatml.segments([user("a"), user("b")])
    for conversation in ([], [user("a")], [user("a"), assistant(" ")], [user("a"), assistant("<image>")]):
        with pytest.raises(ValueError, match="sample s/7"):
            encode_conversation(conversation, chatml, TOKENIZER, [], 100, "s/7")
    with pytest.raises(ValueError, match=r"s/7.*<IMG_CONTEXT>"):
        encode_conversation([user("<IMG_CONTEXT>"), assistant("b")], chatml, TOKENIZER, [], 100, "s/7")
    with pytest.raises(ValueError, match="no token '<picture>'"):
        encode_conversation(TWO_TURNS, chatml, TOKENIZER, [4], 100, "s/7", ImageTokens(context="<picture>"))


def test_whole_turns_are_dropped_and_pictures_never_cut() -> None:
    chatml = load_template("chatml")
    full, _ = encode_conversation(TWO_TURNS, chatml, TOKENIZER, [4], 200, "s")
    first, _ = encode_conversation(TWO_TURNS[:2], chatml, TOKENIZER, [4], 200, "s")
    second_picture = [*TWO_TURNS[:2], user("<image> and here?"), assistant("no")]
    for max_length in range(1, len(full) + 1):
        if max_length < len(first):
            with pytest.raises(ValueError, match=rf"s/7.*max_length={max_length}; its pictures have 4 tokens"):
                encode_conversation(TWO_TURNS, chatml, TOKENIZER, [4], max_length, "s/7")
        else:
            ids, _ = encode_conversation(TWO_TURNS, chatml, TOKENIZER, [4], max_length, "s/7")
            assert ids == (full if max_length == len(full) else first)
    with pytest.raises(ValueError, match=r"s/7.*cut off.*max_length.*4 \+ 5 tokens"):
        encode_conversation(second_picture, chatml, TOKENIZER, [4, 5], len(first) + 3, "s/7")
    with pytest.raises(ValueError, match=r"s/7.*max_length=9; its pictures have 4 tokens"):
        encode_prompt(TWO_TURNS[:1], chatml, TOKENIZER, [4], 9, "s/7")


def test_image_tokens_without_start_and_end() -> None:
    tokens = ImageTokens(start=None, end=None)
    ids, _ = encode_conversation(TWO_TURNS, load_template("plain"), TOKENIZER, [3], 50, "s", tokens)
    assert TOKENIZER.decode(ids) == "<s>" + "<IMG_CONTEXT>" * 3 + "yes\ntop left\n"


def test_masks_come_from_lengths() -> None:
    ids, mask = pad_rows([[0, 0, 5], [7]], 0)
    assert ids.tolist() == [[0, 0, 5], [7, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_pair_collator() -> None:
    pairs = ScenePairs(0, "train")
    samples = [pairs[i] for i in range(16)]
    batch = PairCollator(TOKENIZER, SQUASH)(samples)
    assert batch["keys"] == [f"train/{i}" for i in range(16)]
    assert batch["pixel_values"].shape == (16, 3, 64, 64)
    prompts = {"en": "English caption:", "zh": "Chinese caption:"}
    for row, sample in enumerate(samples):
        caption, prompt = sample["caption"], prompts[sample["language"]]
        for task, text in (("itc", f"summarize: {caption}"), ("itm", caption), ("itg", f"{prompt} {caption}")):
            ids, mask = batch[f"{task}_ids"][row], batch[f"{task}_mask"][row]
            assert ids.dtype == mask.dtype == torch.int64
            assert TOKENIZER.decode(ids[mask.bool()]) == f"<s>{text}</s>"
            assert (ids[~mask.bool()] == TOKENIZER.pad_token_id).all()
        labels = batch["itg_labels"][row]
        assert TOKENIZER.decode(labels[labels != IGNORE_INDEX]) == f": {caption}</s>"
        assert labels[0] == IGNORE_INDEX


def test_pair_collator_tasks_and_errors() -> None:
    sample = ScenePairs(0, "train")[0]
    batch = PairCollator(TOKENIZER, SQUASH, tasks=("itc",))([sample])
    assert set(batch) == {"keys", "pixel_values", "image_ids", "pair_ids", "itc_ids", "itc_mask"}
    short = PairCollator(TOKENIZER, SQUASH, max_length=6, tasks=("itc",))([sample])["itc_ids"][0]
    assert len(short) == 6
    assert short[-1] == TOKENIZER.eos_token_id
    with pytest.raises(ValueError, match=r"train/0.*empty"):
        PairCollator(TOKENIZER, SQUASH)([{**sample, "caption": " "}])
    with pytest.raises(ValueError, match=r"train/0.*'fr'.*en"):
        PairCollator(TOKENIZER, SQUASH, caption_prompts={"en": "Caption:"})([{**sample, "language": "fr"}])
    with pytest.raises(ValueError, match=r"\['vqa'\].*itc"):
        PairCollator(TOKENIZER, SQUASH, tasks=("vqa",))
    with pytest.raises(ValueError, match=r"other: its picture is \(64, 64\) uint8"):
        PairCollator(TOKENIZER, SQUASH)([sample, {**sample, "key": "other", "image": sample["image"][..., 0]}])
    with pytest.raises(ValueError, match=r"one square a picture.* up to 13.*whole\(\)"):
        PairCollator(TOKENIZER, Tiles(64))


def test_pictures_of_any_size_and_which_rows_show_the_same() -> None:
    sample = ScenePairs(0, "train")[0]
    sizes = [sample["image"], np.zeros((9, 300, 3), dtype=np.uint8), np.zeros((1, 1, 3), dtype=np.uint8)]
    samples = [{**sample, "key": str(i), "image": image, "image_id": "ab"[i // 2]} for i, image in enumerate(sizes)]
    batch = PairCollator(TOKENIZER, SQUASH)(samples)
    assert batch["pixel_values"].shape == (3, 3, 64, 64)
    assert batch["image_ids"].dtype == torch.int64
    assert batch["image_ids"][0] == batch["image_ids"][1] != batch["image_ids"][2]
    assert batch["image_ids"].tolist() == [stable_id("a"), stable_id("a"), stable_id("b")]
    own = PairCollator(TOKENIZER, SQUASH)([sample])["image_ids"]
    assert own.tolist() == [stable_id("train/0")]
    assert stable_id("a") == 2340832890917691671  # in every process


def test_chat_collator() -> None:
    collate = ChatCollator(TOKENIZER, load_template("chatml"), SQUASH, tokens_per_tile=4, max_length=200)
    text_only = {"images": [], "conversation": [user("what colour?"), assistant("blue")], "key": "text/0"}
    batch = collate([CHATS[0], text_only, CHATS[1]])
    assert batch["image_counts"].tolist() == [1, 0, 1]
    assert batch["keys"] == ["train/0", "text/0", "train/1"]
    assert torch.equal(batch["pixel_values"], to_pixels(np.stack([CHATS[0]["images"][0], CHATS[1]["images"][0]])))
    assert (batch["input_ids"] == CONTEXT).sum(1).tolist() == [4, 0, 4]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    assert collate([text_only])["pixel_values"].shape == (0, 3, 64, 64)
    with pytest.raises(ValueError, match="text/0: 1 pictures but 0"):
        collate([{**text_only, "images": CHATS[0]["images"]}])


def tiled_sample(key: str, *shapes: tuple[int, int]) -> dict[str, Any]:
    """A conversation with a random picture of each (height, width) in its question."""
    rng = np.random.default_rng(len(shapes))
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return {"images": images, "conversation": [user("<image>" * len(shapes) + "what?"), assistant("yes")], "key": key}


def test_each_picture_has_the_placeholders_of_its_tiles() -> None:
    tiles = Tiles(8, max_tiles=4)
    collate = ChatCollator(TOKENIZER, load_template("chatml"), tiles, tokens_per_tile=2, max_length=60)
    samples = [tiled_sample("a", (8, 8), (40, 20)), tiled_sample("b"), tiled_sample("c", (8, 24))]
    batch = collate(samples)
    assert batch["image_counts"].tolist() == [2, 0, 1]
    runs = "<img>{}</img><img>{}</img>".format("<IMG_CONTEXT>" * 2, "<IMG_CONTEXT>" * 6)
    assert TOKENIZER.decode(batch["input_ids"][0]).startswith(f"<|im_start|>user\n{runs}what?<|im_end|>")
    assert (batch["input_ids"] == CONTEXT).sum(1).tolist() == [2 + 6, 0, 8]
    shown = np.concatenate([tiles(image) for sample in samples for image in sample["images"]])
    assert torch.equal(batch["pixel_values"], to_pixels(shown))
    prompts = collate.prompts([{**sample, "conversation": sample["conversation"][:1]} for sample in samples])
    assert torch.equal(prompts["pixel_values"], batch["pixel_values"])
    for row, whole in zip(range(3), batch["input_ids"], strict=True):
        ids = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        assert torch.equal(ids, whole[: len(ids)])


def test_a_picture_that_does_not_fit_is_named_with_its_tiles() -> None:
    collate = ChatCollator(TOKENIZER, load_template("chatml"), Tiles(8, max_tiles=4), tokens_per_tile=2, max_length=20)
    said = (
        r"sample c: .* max_length=20; its pictures have 6 \+ 2 tokens \(3 \+ 1 tiles of 2\); raise .*max_length, or .*max_tiles"
    )
    with pytest.raises(ValueError, match=said):
        collate([tiled_sample("c", (8, 24), (8, 8))])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blank_batches_are_the_largest(device: str) -> None:
    chats = ChatCollator(TOKENIZER, load_template("chatml"), Tiles(8, max_tiles=4), tokens_per_tile=2, max_length=40)
    blank, real = chats.blank(3, device), chats([tiled_sample("c", (20, 20))])
    assert {name: tensor.dtype for name, tensor in blank.items()} == {n: t.dtype for n, t in real.items() if torch.is_tensor(t)}
    assert all(tensor.device.type == device for tensor in blank.values())
    assert blank["input_ids"].shape == blank["labels"].shape == blank["attention_mask"].shape == (3, 40)
    assert blank["pixel_values"].shape == (3 * 5, 3, 8, 8)
    if device == "cpu":
        assert (blank["input_ids"] == CONTEXT).sum(1).tolist() == [5 * 2] * 3
        assert ((blank["labels"] == IGNORE_INDEX).sum(1) == 5 * 2 + 2).all()
    pairs = PairCollator(TOKENIZER, SQUASH, max_length=9)
    blank, real = pairs.blank(3, device), pairs([ScenePairs(0, "train")[0]])
    assert {name: tensor.dtype for name, tensor in blank.items()} == {n: t.dtype for n, t in real.items() if torch.is_tensor(t)}
    assert {tuple(blank[f"{task}_{x}"].shape) for task in ("itc", "itm", "itg") for x in ("ids", "mask")} == {(3, 9)}
    assert blank["pixel_values"].shape == (3, 3, 64, 64)


def test_to_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pixels = to_pixels(images)
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert np.abs(pixels.numpy() - expected.transpose(0, 3, 1, 2)).max() < 1e-5
