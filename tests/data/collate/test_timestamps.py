"""Times of a video's steps as text: the ids of transformers' processor, and times that do not go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.collate.timestamps import with_times
from lightning_internvl.data.processors.any_resolution import AnyResolution, frame_places
from lightning_internvl.data.templates import IMAGE, VIDEO, load_template, message_of
from lightning_internvl.data.tokenizer import toy_tokenizer

START, END, PICTURE, FILM = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
TOKENIZER = toy_tokenizer((START, END, PICTURE, FILM))


def processor(**options: Any) -> AnyResolution:
    return AnyResolution(128, min_pixels=1024, frame_pixels=(1024, 4096), patch_size=16, **options)


def chats(max_length: int = 600, **options: Any) -> ChatCollator:
    names = ImageTokens(PICTURE, START, END, FILM)
    return ChatCollator(TOKENIZER, load_template("qwen3_vl"), processor(**options), 16, max_length, names)


def sample(question: str, *videos: tuple[int, float], images: int = 0) -> dict[str, Any]:
    films = [(np.full((frames, 40, 72, 3), 9, np.uint8), fps) for frames, fps in videos]
    pictures = [np.zeros((64, 32, 3), np.uint8)] * images
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]
    return {"images": pictures, "videos": films, "conversation": turns, "key": "one"}


def theirs(frames: int, fps: float, grid: list[int], step: int) -> str:
    """What transformers' processor writes for a video whose frames were chosen as ours."""
    own = SimpleNamespace(vision_start_token=START, vision_end_token=END, video_token=FILM)
    own.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=step)
    own._calculate_timestamps = lambda *found: Qwen3VLProcessor._calculate_timestamps(own, *found)
    places = frame_places(frames, fps, 2.0, 4, 768, step)
    metadata = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=places)
    return Qwen3VLProcessor.replace_video_token(own, {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}, 0)


@pytest.mark.parametrize(
    ("frames", "fps", "step"), [(1, 24.0, 2), (4, 2.0, 2), (7, 25.0, 2), (40, 29.97, 2), (90, 30.0, 2), (9, 1.0, 3)]
)
def test_ids_are_those_of_transformers(frames: int, fps: float, step: int) -> None:
    collate = chats(frames=step, max_length=4000)
    batch = collate([sample(f"Look:{VIDEO}What?", (frames, fps))])
    written = theirs(frames, fps, batch["video_grid_thw"][0].tolist(), step)
    text = f"<|im_start|>user\nLook:{written}What?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    assert batch["input_ids"][0].tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert batch["labels"][0].ge(0).sum() == len(TOKENIZER("a cat<|im_end|>")["input_ids"])
    assert collate.check(sample(f"Look:{VIDEO}What?", (frames, fps))) is None


def test_pictures_and_videos_keep_their_order() -> None:
    row = chats().prepare(sample(f"{VIDEO}a{IMAGE}b{VIDEO}", (4, 2.0), (2, 2.0), images=1))["row"][0]
    picture, film = f"{START}{2 * PICTURE}{END}", f"{START}{2 * FILM}{END}"
    written = f"<0.2 seconds>{film}<1.2 seconds>{film}a{picture}b<0.2 seconds>{film}"
    assert written in TOKENIZER.decode(row)


def test_parts_of_a_message() -> None:
    (message,) = with_times([message_of("user", [VIDEO, "here:", IMAGE])], [[0.0, 2.25]], "one")
    assert message["parts"] == ["<0.0 seconds>", VIDEO, "<2.2 seconds>", VIDEO, "here:", IMAGE]
    assert with_times([message_of("user", ["none"])], [], "one") == [message_of("user", ["none"])]


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ([1.0, 0.5], r"sample one: the steps of a video stand at \[1\.0, 0\.5\]: 0\.5 comes after 1\.0, and times must go on"),
        ([-1.0], r"-1\.0 comes after 0\.0"),
        ([0.0, float("nan")], "nan comes after"),
        ([0.0, float("inf")], "inf comes after"),
    ],
)
def test_times_that_do_not_go_on(times: list[float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        with_times([message_of("user", [VIDEO])], [times], "one")


def test_marks_and_videos_that_differ() -> None:
    with pytest.raises(ValueError, match="sample one: 1 videos but 2 '<video>' marks"):
        chats().prepare(sample(f"{VIDEO}{VIDEO}", (4, 2.0)))
    with pytest.raises(ValueError, match="sample one: a video needs one frame or more and a rate above 0; this one has 4 at 0"):
        chats().prepare(sample(VIDEO, (4, 0.0)))
