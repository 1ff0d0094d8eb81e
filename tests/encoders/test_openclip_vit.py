"""The tower of Qwen-VL: no CLS token, and a position table of its own size."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.encoders.openclip_vit import OpenCLIPViT
from lightning_internvl.protocols import Encoder


def tower(**change: object) -> OpenCLIPViT:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "heads": 3, "mlp_dim": 40}
    return OpenCLIPViT(**sizes | change).eval()


def test_tokens_are_the_patches_at_any_size() -> None:
    encoder = tower()
    assert isinstance(encoder, Encoder)
    assert encoder.num_tokens() == 16
    assert encoder.num_tokens(48) == 36
    assert encoder.embeddings.position_embedding.shape == (1, 256, 24)
    first, last = encoder(torch.randn(2, 3, 48, 48), layers=(0, -1))
    assert first.shape == last.shape == (2, 36, 24)
    assert "post_layernorm.weight" not in encoder.state_dict()


def test_another_size_leaves_the_table_as_it_is() -> None:
    encoder, pixels = tower(), torch.randn(1, 3, 64, 64)
    before, table = encoder(pixels)[0], encoder.embeddings.position_embedding.clone()
    encoder.resize(64)
    assert encoder.image_size == 64
    assert encoder.embeddings.position_embedding.equal(table)
    assert encoder(pixels)[0].equal(before)


def test_a_table_of_the_same_grid_is_used_as_it_is() -> None:
    encoder = tower(positions=4)
    patches = torch.nn.functional.conv2d(torch.ones(1, 3, 32, 32), encoder.embeddings.patch_embedding.weight, stride=8)
    expected = encoder.pre_layrnorm(patches.flatten(2).transpose(1, 2) + encoder.embeddings.position_embedding)
    torch.testing.assert_close(encoder(torch.ones(1, 3, 32, 32), layers=(0,))[0], expected)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="both sides must hold a patch of 8"):
        tower()(torch.zeros(1, 3, 30, 7))
