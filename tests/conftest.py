"""Tiny parts with fixed random weights, shared by the tests of all packages."""

from __future__ import annotations

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported: tests run side by side, and sums then have one order

import pytest
import runs  # noqa: F401 (files of conf/ are read once)
import torch

from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.middleware.qllama import QLLaMA


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    """What earlier tests have left in the process: the random state, and the choice of attention."""
    torch.manual_seed(0)
    choose_backend()


@pytest.fixture
def encoder() -> InternViT:
    """17 tokens of width 24 from images of 16 pixels, 3 blocks; weights large enough for every path to matter."""
    return InternViT(image_size=16, patch_size=4, dim=24, depth=3, heads=3, mlp_dim=32, layer_scale=1.0, init_std=0.2).eval()


@pytest.fixture
def qllama() -> QLLaMA:
    """4 queries, width 16, 4 layers, vocabulary 31; made for the tower above, without a decoder."""
    return QLLaMA(
        encoder_dim=24,
        vocab_size=31,
        dim=16,
        depth=4,
        heads=2,
        mlp_dim=24,
        num_queries=4,
        embed_dim=8,
        pool_heads=2,
        init_std=0.2,
    ).eval()


def pytest_collection_finish() -> None:
    """What is imported by now stays; without it, collections of garbage, of which each run asks for some, are short."""
    gc.collect()
    gc.freeze()
