"""Pictures in the grid of squares that shows most of them, and videos, against the processors of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens
from lightning_internvl.data.processors.best_grid import BestGrid
from lightning_internvl.data.processors.resize import order_of_pillow_13
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.layers.best_grid import best_grid
from lightning_internvl.middleware.anyres import AnyresMLP

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
TOKENIZER = toy_tokenizer((IMAGE, VIDEO))
SIDE, PATCH = 28, 7
GRIDS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
LARGE = [[rows, columns] for rows in range(1, 5) for columns in range(1, 5)]
SIZES = [(28, 28), (20, 300), (301, 17), (57, 43), (41, 333), (15, 15), (99, 100), (200, 51), (56, 57), (84, 28)]
HALF = (0.5, 0.5, 0.5)
NEWER = {"grids": LARGE, "map_squares": 3, "frame_pool": 2, "alone_with_others": True, "mean": HALF, "std": HALF}


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


def pinpoints(grids: list[list[int]]) -> list[list[int]]:
    return [[rows * SIDE, columns * SIDE] for rows, columns in grids]


def llava_next() -> LlavaNextProcessor:
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints(GRIDS)
    )
    more = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "image_token": IMAGE}
    return LlavaNextProcessor(pictures, TOKENIZER, patch_size=PATCH, **more)


def onevision() -> LlavaOnevisionProcessor:
    pictures = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints(LARGE), image_mean=HALF, image_std=HALF
    )
    kind = type("Processor", (LlavaOnevisionProcessor,), {"check_argument_for_proper_class": lambda self, name, part: type(part)})
    more = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_3", "image_token": IMAGE}
    return kind(pictures, TOKENIZER, None, num_image_tokens=(SIDE // PATCH) ** 2, video_token=VIDEO, **more)


def chats(newer: bool) -> ChatCollator:
    processor = BestGrid(SIDE, **(NEWER if newer else {"grids": GRIDS}))
    tokens = ImageTokens(IMAGE, None, None, VIDEO if newer else None)
    return ChatCollator(TOKENIZER, load_template("chatml"), processor, (SIDE // PATCH) ** 2 + 1, 5000, tokens)


def sample(text: str, images: list[np.ndarray], videos: list[tuple[np.ndarray, float]] | None = None) -> dict[str, object]:
    conversation = [{"role": "user", "content": text}, {"role": "assistant", "content": "a cat"}]
    return {"images": images, "videos": videos or [], "conversation": conversation, "key": "train/3"}


def in_one_row(stacks: Tensor, grids: Tensor) -> Tensor:
    """The squares of transformers' stacks without those that fill them up."""
    return torch.cat([stack[: rows * columns + 1] for stack, (rows, columns) in zip(stacks, grids.tolist(), strict=True)])


@pytest.mark.parametrize("newer", [False, True], ids=["LLaVA-NeXT", "OneVision"])
def test_the_same_pixels_and_ids_as_transformers(newer: bool) -> None:
    theirs, ours = onevision() if newer else llava_next(), chats(newer)
    for size in SIZES:
        image = picture(*size)
        prompt = {**sample("<image>\nwhat is it?", [image])}
        prompt["conversation"] = prompt["conversation"][:1]
        found = ours.prompts([prompt])
        text = f"<|im_start|>user\n{IMAGE}\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
        with order_of_pillow_13():
            expected = theirs(text=[text], images=[Image.fromarray(image)], return_tensors="pt", add_special_tokens=False)
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()
        assert found["image_sizes"].tolist() == expected["image_sizes"].tolist()
        pixels = in_one_row(expected["pixel_values"], found["image_grids"])
        torch.testing.assert_close(found["pixel_values"], pixels, rtol=0, atol=2e-6)


def test_several_pictures_of_a_record() -> None:
    images = [picture(*size) for size in ((20, 60), (57, 43), (31, 30))]
    text = f"<|im_start|>user\n{IMAGE}{IMAGE}{IMAGE}who?<|im_end|>\n<|im_start|>assistant\n"
    opened = [Image.fromarray(image) for image in images]
    for newer in (False, True):
        theirs, ours = onevision() if newer else llava_next(), chats(newer)
        row = sample("<image><image><image>who?", images)
        found = ours([row])
        with order_of_pillow_13():
            expected = theirs(text=[text], images=[opened] if newer else opened, return_tensors="pt", add_special_tokens=False)
        ids = expected["input_ids"][0].tolist()
        assert found["input_ids"][0].tolist()[: len(ids)] == ids
        assert found["image_grids"].tolist() == ([[0, 0]] * 3 if newer else [[1, 3], [2, 2], [2, 2]])
        pixels = in_one_row(expected["pixel_values"], found["image_grids"])
        torch.testing.assert_close(found["pixel_values"], pixels, rtol=0, atol=2e-6)
        asked = ours.prompts([{**row, "conversation": row["conversation"][:1]}])
        assert asked["pixel_values"].equal(found["pixel_values"])
        assert asked["input_ids"].tolist() == [ids]


def test_grids_are_those_of_the_official_rule() -> None:
    rng = np.random.default_rng(0)
    for grids in (GRIDS, LARGE):
        for _ in range(1500):
            height, width = (int(x) for x in np.exp(rng.uniform(1, 7, 2)))
            rows, columns = select_best_resolution((height, width), pinpoints(grids))
            assert best_grid(height, width, SIDE, tuple(map(tuple, grids))) == (rows // SIDE, columns // SIDE)


@pytest.mark.parametrize("settings", [{"grids": GRIDS}, NEWER], ids=["LLaVA-NeXT", "OneVision"])
def test_as_many_tokens_as_the_connector_gives(settings: dict[str, object]) -> None:
    processor = BestGrid(SIDE, **settings)
    encoder = SiglipViT(image_size=SIDE, patch_size=PATCH, dim=8, depth=1, heads=2, mlp_dim=8, head="none")
    own = {name: settings[name] for name in ("grids", "map_squares", "frame_pool") if name in settings}
    middleware = AnyresMLP(encoder_dim=8, decoder_dim=6, special_tokens=0, patch_layer=-1, **own)
    one = middleware.tokens_out(encoder.num_tokens())
    rng = np.random.default_rng(1)
    most = 0
    for _ in range(200):
        size = tuple(int(x) for x in np.exp(rng.uniform(1.5, 6, 2)))
        shape = processor.shape(*size)
        squares = np.broadcast_to(np.zeros((), np.uint8), shape)
        found = middleware([torch.zeros(shape[0], one - 1, 8)], [size], [processor.grid(*size)])
        assert len(found) == processor.tokens(squares, one, size)
        most = max(most, len(found))
    assert most <= processor.most_tokens(one)
    blank = processor.blank(3)
    assert len(middleware(encoder(blank.pop("pixel_values")), **blank)) == 3 * one


def test_videos_are_frames_spread_evenly_and_pooled() -> None:
    ours = chats(newer=True)
    film = picture(90, 20, 40)
    batch = ours([sample("<video>what? <image>", [picture(28, 56)], [(film, 30.0)]), sample("<video>", [], [(film[:1], 2.0)])])
    assert batch["video_grids"].tolist() == [[3, 0], [1, 0]]
    assert batch["image_grids"].tolist() == [[1, 2]]
    assert batch["pixel_values_videos"].shape == (4, 3, SIDE, SIDE)
    assert "second_per_grid_ts" not in batch
    counts = (batch["input_ids"] == TOKENIZER.convert_tokens_to_ids(VIDEO)).sum(dim=1)
    assert counts.tolist() == [3 * 4 + 1, 4 + 1]  # 2 x 2 of 4 x 4, and one behind the last frame
    whole = BestGrid(SIDE, **NEWER).whole()
    assert batch["pixel_values_videos"][3].equal(whole.inputs([whole(film[0])])["pixel_values"][0])


def test_what_it_cannot_prepare_is_named() -> None:
    ours = BestGrid(SIDE, GRIDS)
    with pytest.raises(ValueError, match=r"BestGrid prepares pictures only .*videos need middleware\.frame_pool=2"):
        ours.video(picture(3, 20, 20), 2.0)
    with pytest.raises(ValueError, match=r"this one has 0 at 2\.0 a second"):
        BestGrid(SIDE, **NEWER).video(picture(0, 20, 20), 2.0)
    with pytest.raises(ValueError, match=r"grids=\[\[2, 0\]\] must be one or more pairs"):
        BestGrid(SIDE, [[2, 0]])
    with pytest.raises(ValueError, match=r"videos need fps=0\.0 above 0"):
        BestGrid(SIDE, GRIDS, fps=0.0)
