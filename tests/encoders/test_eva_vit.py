"""The EVA ViT: shapes, layers, biases, sizes, bad input. Parity with transformers is in tests/checkpoints/test_blip2.py."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.encoders.features import Features


def make(**change: object) -> EvaViT:
    torch.manual_seed(0)
    return EvaViT(**{"image_size": 24, "patch_size": 6, "dim": 16, "depth": 3, "heads": 2, "mlp_dim": 20} | change).eval()


def test_layers_and_tokens() -> None:
    tower, pixels = make(), torch.randn(2, 3, 24, 24)
    first, last = tower(pixels, layers=(0, -1))
    assert first.shape == last.shape == (2, 17, 16)
    assert tower.num_tokens() == 17
    assert tower.num_tokens(36) == 37
    assert tower(pixels, layers=(-2,))[0].equal(tower(pixels, layers=(2,))[0])
    assert tower(pixels, keep=0.5)[0].shape == (2, 9, 16)
    assert len(tower.sharding_units()) == 3


def test_a_bias_of_keys_changes_nothing() -> None:
    without, pixels = make(), torch.randn(2, 3, 24, 24)
    with_keys = make(k_bias=True)
    with_keys.load_state_dict(without.state_dict(), strict=False)
    for block in with_keys.blocks:
        torch.nn.init.normal_(block.attn.k_bias)
    torch.testing.assert_close(with_keys(pixels)[0], without(pixels)[0])
    assert not any("bias" in name for name in make(qkv_bias=False).blocks[0].attn.state_dict() if "proj" not in name)


def test_other_sizes_need_not_be_square() -> None:
    tower = make()
    assert tower(torch.randn(1, 3, 36, 12))[0].shape == (1, 13, 16)
    pixels = torch.randn(1, 3, 36, 36)
    expected = tower(pixels)[0]
    tower.resize(36)
    torch.testing.assert_close(tower(pixels)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 15}, "must divide by"),
        ({"act": "loud"}, "act='loud' is not known"),
        ({"qkv_bias": False, "k_bias": True}, "k_bias needs"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="5 x 24 pixels: both sides must hold a patch of 6"):
        make()(torch.randn(1, 3, 5, 24))
    with pytest.raises(ValueError, match=r"layers \[4\] do not exist"):
        make()(torch.randn(1, 3, 24, 24), layers=(4,))


def test_features_stand_in_for_a_tower() -> None:
    features = torch.randn(2, 5, 8)
    assert Features(dim=8)(features, layers=(-1, -2))[1] is features
    with pytest.raises(ValueError, match="width 8 where 9 are expected; this model has no tower"):
        Features(dim=9)(features)
