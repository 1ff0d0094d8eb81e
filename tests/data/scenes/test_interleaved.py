"""Rows of several pictures, and videos, of the built-in scenes."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.scenes.datasets import SceneChats
from lightning_internvl.data.scenes.interleaved import SceneAlbums, SceneVideos
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer

TOKENIZER = toy_tokenizer(["<|endofchunk|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"])


def test_an_album_is_its_scenes_one_after_the_other() -> None:
    albums, chats = SceneAlbums(0, "train", 32, turns=2, pictures=3), SceneChats(0, "train", 32, turns=2)
    sample = albums[5]
    parts = [chats[place] for place in (15, 16, 17)]
    assert all(np.array_equal(a, part["images"][0]) for a, part in zip(sample["images"], parts, strict=True))
    assert sample["conversation"] == [message for part in parts for message in part["conversation"]]
    assert len({albums[i]["key"] for i in range(4)}) == 4
    assert len(SceneAlbums(0, "train", 32, length=4, pictures=3)[3]["images"]) == 3


def test_one_placeholder_a_picture_and_every_chunk_closed() -> None:
    albums = SceneAlbums(0, "train", 32, turns=2, pictures=3)
    collate = ChatCollator(TOKENIZER, load_template("flamingo"), Squash(32), 1, 400, ImageTokens(start=None, end=None))
    batch = collate([albums[0], albums[1]])
    assert (batch["input_ids"] == TOKENIZER.convert_tokens_to_ids("<IMG_CONTEXT>")).sum(dim=1).tolist() == [3, 3]
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    template = load_template("flamingo_vqa")
    first, answer = (template.written(albums[0]["conversation"][place])["content"] for place in (0, 1))
    text = TOKENIZER.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert text.startswith("<IMG_CONTEXT>" + first.removeprefix("<image>") + answer + "<|endofchunk|>")
    asked = template.segments(albums[0]["conversation"][:2])
    question = f"<image>Question:{first.removeprefix('<image>')} Short answer:"
    assert [segment.text for segment in asked] == [question, f"{answer}<|endofchunk|>"]


def test_a_video_shows_its_scenes_a_second_each() -> None:
    videos, chats = SceneVideos(0, "train", 32, scenes=3), SceneChats(0, "train", 32)
    sample = videos[2]
    frames, fps = sample["videos"][0]
    assert fps == 2.0
    assert frames.shape == (6, 32, 32, 3)
    assert all(np.array_equal(frames[2 * i + j], chats[6 + i]["images"][0]) for i in range(3) for j in range(2))
    processor = AnyResolution(32, patch_size=8, min_pixels=256, frame_pixels=(256, 1024))
    tokens = ImageTokens("<IMG_CONTEXT>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    batch = ChatCollator(TOKENIZER, load_template("qwen2_vl"), processor, 4, 400, tokens)([sample])
    assert batch["video_grid_thw"].tolist() == [[3, 4, 4]]
    assert batch["image_grid_thw"].shape == (0, 3)


@pytest.mark.parametrize(("kind", "argument"), [(SceneAlbums, "pictures"), (SceneVideos, "scenes")])
def test_none_at_all_is_refused(kind: type[SceneChats], argument: str) -> None:
    with pytest.raises(ValueError, match=f"not {argument}=0"):
        kind(0, "train", 32, **{argument: 0})
