"""Videos whose frames are pictures of one tile each."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.collate.video_frames import FrameLimits
from lightning_internvl.data.processors.basic import Tiles
from lightning_internvl.data.processors.blank import BlankPictures
from lightning_internvl.data.templates import IMAGE, VIDEO, load_template, message_of
from lightning_internvl.data.tokenizer import toy_tokenizer

TOKENIZER = toy_tokenizer()
TILES = Tiles(8, max_tiles=6)


def collator(limits: list[int] | None, **options: Any) -> ChatCollator:
    return ChatCollator(TOKENIZER, load_template("internvl2_5", ""), TILES, 1, 2000, video_frames=limits, **options)


def film(frames: int, height: int = 16, width: int = 16) -> np.ndarray:
    """Frames that are told apart by their colour."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, height, width, 3)).copy()


def sample(question: str, images: list[np.ndarray], *videos: np.ndarray, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]
    return {"images": images, "videos": [(one, 2.0) for one in videos], "conversation": turns, "key": "x/1", **more}


def text_of(batch: dict[str, Any]) -> str:
    return TOKENIZER.decode(batch["input_ids"][0]).replace(" ", "")


def test_frames_stand_in_the_text_as_the_official_code_writes_them() -> None:
    batch = collator([2, 3])([sample(f"{VIDEO}\nwhat?", [], film(3))])
    picture = "<img><IMG_CONTEXT></img>"
    assert f"Frame-1:{picture}\nFrame-2:{picture}\nFrame-3:{picture}\nwhat?" in text_of(batch)
    assert batch["image_counts"].tolist() == [3]
    plain = "\n".join(f"Frame-{number}: {IMAGE}" for number in (1, 2, 3)) + "\nwhat?"
    as_pictures = collator(None)([sample(plain, [*film(3)])])
    assert batch["input_ids"].equal(as_pictures["input_ids"])
    assert batch["pixel_values"].equal(as_pictures["pixel_values"])


def test_pictures_and_frames_keep_their_order_and_frames_are_one_tile() -> None:
    picture = np.full((16, 32, 3), 99, np.uint8)  # 2 x 1 tiles and a thumbnail
    batch = collator([1, 8])([sample(f"{IMAGE}{VIDEO}{IMAGE}what?", [picture, picture], film(2, 16, 32))])
    pixels = TILES.inputs([np.stack([np.full((8, 8, 3), value, np.uint8) for value in (99, 99, 99, 0, 1, 99, 99, 99)])])
    assert batch["pixel_values"].equal(pixels["pixel_values"])
    # six tiles are shared by the two pictures alone
    shared = [TILES.shared(2)(picture) for _ in range(2)]
    assert sum(map(len, shared)) + 2 == len(batch["pixel_values"])


def test_parts_are_joined_as_the_format_joins_them() -> None:
    turns = [message_of("user", [VIDEO, "what?"]), {"role": "assistant", "content": "a cat"}]
    apart = collator([1, 8])([{**sample("", [], film(2)), "conversation": turns}])
    assert apart["input_ids"].equal(collator([1, 8])([sample(f"{VIDEO}\nwhat?", [], film(2))])["input_ids"])


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 31, 500])
def test_a_draw_takes_a_frame_of_each_part(frames: int) -> None:
    limits = FrameLimits(3, 8)
    seen = set()
    for place in range(200):
        places = limits.places(frames, [0, place])
        assert places == limits.places(frames, [0, place])
        assert places == sorted(set(places))
        assert set(places) <= set(range(frames))
        seen.add(len(places))
    assert seen == set(range(min(3, frames), min(8, frames) + 1))
    assert len(limits.places(frames, None)) == min(8, frames)


def test_questions_see_the_most_frames_and_training_draws_their_number() -> None:
    collate = collator([2, 5])
    asked = sample(f"{VIDEO}\nwhat?", [], film(9))
    prompt = {**asked, "conversation": asked["conversation"][:1]}
    assert (collate.prompts([prompt])["input_ids"] == TOKENIZER.convert_tokens_to_ids("<IMG_CONTEXT>")).sum() == 5
    counts = {len(collate.prepare({**asked, "draw": (0, place)})["pictures"]) for place in range(40)}
    assert counts == {2, 3, 4, 5}


def test_a_check_of_shapes_counts_the_same_tokens() -> None:
    checked = collator([2, 5])
    checked.max_length = 60
    checked.processor = BlankPictures(TILES)
    real = collator([2, 5])
    real.max_length = 60
    long = sample(f"{VIDEO}\n" + "what? " * 30, [], film(9))
    messages = []
    for one in (checked, real):
        with pytest.raises(ValueError, match="x/1: its first turn does not fit") as caught:
            one.check(long)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (sample("what?", [], film(2)), "x/1: 1 videos but 0 '<video>' marks"),
        (sample(f"{VIDEO}what?", []), "x/1: 0 videos but 1 '<video>' marks"),
        (sample(f"{VIDEO}{IMAGE}what?", [], film(2)), "x/1: 2 pictures but 3 '<image>' marks"),
        (sample(f"{VIDEO}what?", [film(1)[0]], film(2)), "x/1: 3 pictures but 2 '<image>' marks"),
        (sample(f"{VIDEO}what?", [], film(0)), "x/1: its video is (0, 16, 16, 3), not (F, H, W, 3) with a frame"),
    ],
)  # fmt: skip
def test_bad_samples_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        collator([2, 5])([given])


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"video_frames=\[3, 2\] must be two whole numbers that rise"):
        collator([3, 2])
    with pytest.raises(ValueError, match=r"data\.video_token=<\|video_pad\|>; set one of them to null"):
        collator([2, 3], image_tokens=ImageTokens(video="<|video_pad|>"))
    assert not collator(None).reads_videos
    with pytest.raises(ValueError, match=r"data\.chats_collate\.video_frames=\[8, 32\], which makes frames pictures"):
        collator(None)([sample(f"{VIDEO}what?", [], film(2))])


def test_packed_rows_hold_videos() -> None:
    from lightning_internvl.data.collate.packed import PackedChats

    packed = PackedChats(
        TOKENIZER, load_template("internvl2_5", ""), TILES, 1, 300, video_frames=[2, 5], row_tokens=300, row_tiles=12
    )
    prepared = [packed.prepare(sample(f"{VIDEO}\nwhat?", [], film(count))) for count in (2, 5)]
    batch = packed.pack([prepared])
    assert batch["pixel_values"].shape == (7, 3, 8, 8)
    alone = collator([2, 5])([sample(f"{VIDEO}\nwhat?", [], film(count)) for count in (2, 5)])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])


def test_a_check_counts_what_prepare_makes_of_frames() -> None:
    record = sample(f"{VIDEO}\nwhat?", [], film(2, 16, 32))  # as pictures these would be three tiles each
    record["conversation"] += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "a dog"}]
    tokens = len(collator([1, 8]).prepare(record)["row"][0])
    tight = ChatCollator(TOKENIZER, load_template("internvl2_5", ""), TILES, 1, tokens - 1, video_frames=[1, 8])
    assert tight.check(record) == tokens
