"""Held-out pictures reach the model through the processor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.processors.basic import Tiles
from lightning_internvl.data.processors.pixels import to_pixels
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Predictor

TOKENIZER = toy_tokenizer()
TILES = Tiles(8, max_tiles=4)


class Recorder(torch.nn.Module):
    """A model that keeps what it is given and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def generate(self, **batch: Any) -> Tensor:
        self.seen.append(batch)
        return torch.full((len(batch["input_ids"]), 1), TOKENIZER.eos_token_id)

    def encode_image(self, pixels: Tensor, mode: str) -> Tensor:
        self.seen.append({"pixel_values": pixels})
        return torch.ones(len(pixels), 2)


@pytest.fixture
def predictor() -> Predictor:
    chats = ChatCollator(TOKENIZER, load_template("chatml"), TILES, tokens_per_tile=2, max_length=40)
    return Predictor(Recorder(), SimpleNamespace(), pairs=PairCollator(TOKENIZER, TILES.whole()), chats=chats, batch_size=10)


def test_questions_about_tiles(predictor: Predictor) -> None:
    images = [np.full((8 * height, 8, 3), height, dtype=np.uint8) for height in (1, 2, 3)]
    assert predictor.answer(images, ["what?", "where is it?", "why?"]) == ["", "", ""]
    context = TOKENIZER.convert_tokens_to_ids("<IMG_CONTEXT>")
    counts = [(batch["input_ids"] == context).sum(1).tolist() for batch in predictor.model.seen]
    assert counts == [[2, 6], [8]]  # ten tiles at a time hold two pictures of up to five
    assert torch.equal(predictor.model.seen[1]["pixel_values"], to_pixels(TILES(images[2])))
    assert predictor.model.seen[0]["attention_mask"][:, -1].all()


def test_embeddings_read_the_whole_picture(predictor: Predictor) -> None:
    images = [np.full((30, 9, 3), value, dtype=np.uint8) for value in range(12)]
    assert predictor.embed_images(images, "c").shape == (12, 2)
    assert [len(batch["pixel_values"]) for batch in predictor.model.seen] == [10, 2]


def test_afterwards_mode_and_journal_are_as_before(predictor: Predictor) -> None:
    before, other = predictor.journal, Journal()
    with predictor.evaluating(journal=other):
        assert predictor.journal is other
        assert not predictor.model.training
    assert predictor.journal is before
    assert predictor.model.training
