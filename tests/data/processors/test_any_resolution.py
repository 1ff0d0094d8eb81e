"""Pictures of any size and videos, against the image processor of transformers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.video_utils import VideoMetadata

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.processors.any_resolution import AnyResolution, frame_places, smart_size
from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer

NAMES = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TOKENIZER = toy_tokenizer(NAMES)
SIZES = [(64, 64), (28, 28), (20, 300), (301, 17), (57, 43), (200, 333), (15, 15), (99, 100), (700, 41)]


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("patch", "merge", "frames", "low", "high"), [(14, 2, 2, 3136, 50176), (6, 3, 2, 400, 20000), (8, 1, 1, 64, 9000)]
)
def test_the_same_patches_as_transformers(patch: int, merge: int, frames: int, low: int, high: int) -> None:
    theirs = Qwen2VLImageProcessorPil(
        min_pixels=low, max_pixels=high, patch_size=patch, merge_size=merge, temporal_patch_size=frames
    )  # fmt: skip
    ours = AnyResolution(1, min_pixels=low, max_pixels=high, patch_size=patch, merge_size=merge, frames=frames)
    images = [picture(*size) for size in SIZES]
    expected = theirs(images, return_tensors="pt")
    prepared = [ours(image) for image in images]
    found = ours.inputs(prepared)
    assert found["image_grid_thw"].equal(expected["image_grid_thw"])
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=0, atol=2e-6)
    assert [ours.tokens(x, 0) for x in prepared] == (expected["image_grid_thw"].prod(dim=1) // merge**2).tolist()


def test_sizes_are_those_of_the_official_rule() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(x) for x in np.exp(rng.uniform(1, 8, 2)))
        if max(height, width) <= 200 * min(height, width):
            assert smart_size(height, width, 28, 3136, 602112) == smart_resize(height, width, 28, 3136, 602112)
    with pytest.raises(ValueError, match="2001 x 10 px is a strip"):
        smart_size(10, 2001, 28, 3136, 602112)


def test_a_picture_never_has_more_tokens_than_the_largest_square() -> None:
    processor = AnyResolution(112, min_pixels=784)
    assert max(processor.tokens(processor(picture(*size)), 0) for size in SIZES) <= (112 // 28) ** 2
    blank = processor.blank(3)
    assert len(blank["pixel_values"]) == sum(t * h * w for t, h, w in blank["image_grid_thw"]) == 3 * 64


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        (1, 30.0, 1), (2, 30.0, 2), (3, 30.0, 2), (5, 30.0, 4), (60, 30.0, 4), (300, 30.0, 20), (310, 30.0, 20), (9000, 1.0, 768),
        (100, 2.0, 100), (101, 2.0, 100),
    ],
)  # fmt: skip
def test_frames_are_spread_over_the_whole_video(total: int, fps: float, expected: int) -> None:
    places = frame_places(total, fps, 2.0, 4, 768, 2)
    assert len(places) == expected
    assert places[0] == 0
    assert places[-1] == total - 1
    assert places == sorted(set(places))


def test_a_video_of_one_frame_is_a_picture() -> None:
    low, high = 784, 12544
    processor = AnyResolution(112, min_pixels=low, max_pixels=high, frame_pixels=(low, high))
    image = picture(56, 84)
    video, still = processor.inputs([processor.video(image[None], 25.0)]), processor.inputs([processor(image)])
    assert all(video[name].equal(still[name]) for name in still)


def test_two_frames_share_a_patch_in_their_order() -> None:
    processor = AnyResolution(112, min_pixels=784, frame_pixels=(784, 12544))
    video = np.stack([np.full((28, 56, 3), value, np.uint8) for value in (0, 60, 120, 255)])
    found = processor.inputs([processor.video(video, 2.0)])
    assert found["image_grid_thw"].tolist() == [[2, 2, 4]]
    seen = found["pixel_values"].reshape(2, 8, 3, 2, 196)  # step, patch, channel, frame, pixel
    assert torch.equal(seen.amin(dim=(1, 4)), seen.amax(dim=(1, 4)))
    values = processor.inputs([video[:1], video[1:2], video[2:3], video[3:]])["pixel_values"].reshape(4, -1, 3, 2, 196)[
        :, 0, :, 0, 0
    ]
    assert torch.equal(seen[:, 0, :, :, 0].transpose(1, 2).flatten(0, 1), values)


def test_many_frames_become_smaller() -> None:
    processor = AnyResolution(112, min_pixels=784, frame_pixels=(784, 50176), video_tokens=64)
    few, many = (processor.video(picture(n, 112, 112), 2.0) for n in (4, 40))
    assert few.shape[1:3] == (112, 112)
    assert many.shape[1:3] < few.shape[1:3]
    assert processor.tokens(few, 0) <= 64


@pytest.mark.parametrize(
    "settings",
    [{"min_pixels": 20000}, {"max_pixels": 500}, {"fps": 0.0}, {"min_frames": 9, "max_frames": 4}, {"frame_pixels": (5, 4)}],
)
def test_settings_that_contradict_each_other(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needs? "):
        AnyResolution(112, **settings)


def chats(**settings: object) -> ChatCollator:
    processor = AnyResolution(112, min_pixels=784, frame_pixels=(784, 12544), **settings)
    start, end, image, video = NAMES
    tokens = ImageTokens(image, start, end, video)
    return ChatCollator(TOKENIZER, load_template("qwen2_vl"), processor, 16, 200, tokens)


def sample(text: str, images: list[np.ndarray], videos: list[tuple[np.ndarray, float]]) -> dict[str, object]:
    conversation = [{"role": "user", "content": text}, {"role": "assistant", "content": "a cat"}]
    return {"images": images, "videos": videos, "conversation": conversation, "key": "train/3"}


def test_a_batch_of_pictures_and_videos() -> None:
    collate = chats()
    batch = collate(
        [
            sample("<image><video>what is where?", [picture(28, 84)], [(picture(3, 28, 56), 2.0)]),
            sample("<image>", [picture(56, 56)], []),
        ]
    )
    assert batch["image_grid_thw"].tolist() == [[1, 2, 6], [1, 4, 4]]
    assert batch["video_grid_thw"].tolist() == [[1, 2, 4]]
    assert batch["second_per_grid_ts"].tolist() == [1.5]  # two frames of a step, taken of three at two a second
    assert batch["pixel_values"].shape == (28, 1176)
    assert batch["pixel_values_videos"].shape == (8, 1176)
    text = TOKENIZER.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>what is where?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
    )
    assert (batch["input_ids"] == TOKENIZER.convert_tokens_to_ids("<|image_pad|>")).sum(dim=1).tolist() == [3, 4]


@pytest.mark.parametrize(("frames", "fps"), [(1, 24.0), (3, 2.0), (4, 2.0), (7, 25.0), (40, 29.97), (500, 30.0)])
def test_steps_are_apart_as_in_transformers(frames: int, fps: float) -> None:
    processor = AnyResolution(112, max_frames=32)
    places = frame_places(frames, fps, processor.fps, processor.min_frames, processor.max_frames, processor.frames)
    theirs = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=places)
    assert processor.step_seconds(frames, fps) == processor.frames / theirs.sampled_fps  # as `Qwen2_5_VLProcessor` has it


def test_a_batch_of_text_alone_has_the_same_names() -> None:
    collate = chats()
    batch = collate([sample("hello", [], [])])
    assert batch["pixel_values"].shape == batch["pixel_values_videos"].shape == (0, 1176)
    assert batch["image_grid_thw"].shape == batch["video_grid_thw"].shape == (0, 3)
    assert batch.keys() == collate([sample("<image>", [picture(56, 56)], [])]).keys()


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        ("<video>", [], [], "train/3: 0 videos but 1 '<video>' marks"),
        ("<image>", [], [(picture(4, 28, 28), 2.0)], "train/3: 0 pictures but 1 '<image>' marks"),
        ("<video>", [], [(picture(4, 28, 28), 0.0)], "train/3: a video needs one frame or more and a rate above 0"),
        ("<video>", [], [(picture(28, 28), 2.0)], "train/3: its video is"),
        ("<image>", [picture(10, 3000)], [], "is a strip"),
        ("<|video_pad|>", [], [], "its text contains '<|video_pad|>'; write '<image>' or '<video>'"),
    ],
)  # fmt: skip
def test_bad_samples_are_named(text: str, images: list[np.ndarray], videos: list[tuple[np.ndarray, float]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        chats()([sample(text, images, videos)])


def test_videos_need_a_token_and_a_processor_that_reads_them() -> None:
    video = [(picture(4, 28, 28), 2.0)]
    plain = ChatCollator(TOKENIZER, load_template("vicuna"), Squash(28), 1, 200)
    with pytest.raises(
        ValueError, match=r"train/3: Squash prepares pictures only; videos need processor@data\.processor=any_resolution"
    ):
        plain([sample("look", [], video)])
    plain = ChatCollator(TOKENIZER, load_template("vicuna"), AnyResolution(112), 1, 200)
    with pytest.raises(ValueError, match=r"train/3: it has videos, for which this recipe has no token; set data\.video_token"):
        plain([sample("look", [], video)])
    too_long = chats()
    too_long.max_length = 60
    with pytest.raises(ValueError, match=r"or lower data\.processor\.image_size"):
        too_long([sample("<image>" * 4, [picture(112, 112)] * 4, [])])
