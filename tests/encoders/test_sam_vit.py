"""SAM beside transformers' own, windows, distances, and what it refuses. Pairs of towers."""

from __future__ import annotations

import pytest
import torch
from transformers import SamVisionConfig, SamVisionModel

from lightning_internvl.checkpoints.families.sam import moved, native_rules, sam_tower
from lightning_internvl.checkpoints.name_rules import match_rules
from lightning_internvl.encoders.hybrid import HybridEncoder
from lightning_internvl.encoders.openclip_vit import OpenCLIPViT
from lightning_internvl.encoders.sam_vit import SamViT, from_windows, relative_positions, to_windows
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.middleware.hybrid_mlp import HybridMLP
from lightning_internvl.protocols import Encoder, Middleware

CONFIG = {
    "hidden_size": 32, "output_channels": 6, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 8,
    "mlp_ratio": 2.0, "window_size": 3, "global_attn_indexes": [1],
}  # fmt: skip


def tower(**change: object) -> SamViT:
    torch.manual_seed(0)
    encoder = sam_tower(CONFIG | change, out_grid=2).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.2)
    return encoder


def test_windows_come_back() -> None:
    x = torch.randn(2, 7, 7, 5)
    cut = to_windows(x, 3)
    assert cut.shape == (18, 3, 3, 5)
    assert cut[0].equal(x[0, :3, :3])
    assert cut[1].equal(x[0, :3, 3:6])
    assert cut[2][:, 1:].abs().sum() == 0  # filled up
    assert from_windows(cut, 3, 7).equal(x)


def test_distances_of_all_pairs() -> None:
    table = torch.arange(5.0)[:, None]
    assert relative_positions(table, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    assert relative_positions(table, 4).shape == (4, 4, 1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_rel_pos": False},
        {"use_abs_pos": False},
        {"qkv_bias": False},
        {"window_size": 7},
        {"global_attn_indexes": [0, 2]},
    ],
    ids=str,
)
def test_the_map_before_the_convolutions_is_that_of_transformers(change: dict[str, object]) -> None:
    ours = tower(**change)
    theirs = SamVisionModel(SamVisionConfig(**CONFIG | change)).eval()
    rules = moved(native_rules("encoder.high.", ""), "encoder.high.", "")
    groups, homeless = match_rules(rules, ours.state_dict())
    assert not homeless
    named = {name: t for group in groups for name, t in group.write(ours.state_dict()).items()}
    prefix = "high_res_vision_model."
    theirs.load_state_dict({n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)})
    pixels, seen = torch.randn(2, 3, 56, 56), []
    ours.neck.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        ours(pixels)
        torch.testing.assert_close(seen[0], theirs(pixels).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_shapes_gradients_and_other_sizes() -> None:
    encoder = tower()
    assert isinstance(encoder, Encoder)
    (tokens,) = encoder(torch.randn(2, 3, 56, 56))
    assert tokens.shape == (2, encoder.num_tokens(), encoder.dim) == (2, 4, 24)
    tokens.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder(torch.randn(1, 3, 80, 80))[0].shape == (1, 4, 24)


def test_backends_agree() -> None:
    encoder, pixels = tower(), torch.randn(1, 3, 56, 56)
    expected = encoder(pixels)[0]
    try:
        choose_backend("math")
        torch.testing.assert_close(encoder(pixels)[0], expected)
    finally:
        choose_backend("sdpa")


def test_the_second_way_starts_silent() -> None:
    encoder = SamViT(image_size=32, patch_size=8, dim=16, depth=2, heads=2, mlp_dim=16, window=2, global_layers=[0], neck_dim=4)
    pixels = torch.randn(1, 3, 32, 32)
    before = encoder(pixels)[0]
    for parameter in encoder.neck_hd.parameters():
        torch.nn.init.normal_(parameter)
    assert encoder(pixels)[0].equal(before)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"global_attn_indexes": []}, "at least one"),
        ({"global_attn_indexes": [3]}, "blocks from 0 to 2"),
        ({"image_size": 50}, "divide"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        sam_tower(CONFIG | change, out_grid=2)


def test_what_it_does_not_give() -> None:
    with pytest.raises(ValueError, match="its last map"):
        tower()(torch.zeros(1, 3, 56, 56), layers=(0,))
    with pytest.raises(ValueError, match="square sides that divide by 8"):
        tower()(torch.zeros(1, 3, 56, 48))
    with pytest.raises(ValueError, match=r"high_res_vision_config\.num_channels=4"):
        sam_tower(CONFIG | {"num_channels": 4}, out_grid=2)


def pair(**change: object) -> HybridEncoder:
    low = OpenCLIPViT(**{"image_size": 16, "patch_size": 8, "dim": 20, "depth": 1, "heads": 2, "mlp_dim": 16} | change)
    return HybridEncoder(low=low, high=tower())


def test_a_pair_of_towers_and_its_connector() -> None:
    encoder = pair()
    assert isinstance(encoder, Encoder)
    low, high = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 56, 56)
    feats = encoder(low, high_res_pixel_values=high)
    assert [f.shape for f in feats] == [(2, 4, 20), (2, 4, 24)]
    assert feats[0].equal(encoder.low(low)[0])
    assert feats[1].equal(encoder.high(high)[0])
    connector = HybridMLP(encoder_dims=encoder.dims, decoder_dim=12)
    assert isinstance(connector, Middleware)
    both = torch.cat([connector.high_up_proj(feats[1]), connector.low_up_proj(feats[0])], dim=-1)
    torch.testing.assert_close(connector(feats), connector.proj(torch.nn.functional.gelu(both)))
    assert {name: x.shape for name, x in encoder.blank(low[:0]).items()} == {
        "pixel_values": (1, 3, 16, 16),
        "high_res_pixel_values": (1, 3, 56, 56),
    }


def test_pairs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="the low tower gives 9 tokens at 24 px, the high one 4 at 56 px"):
        pair(image_size=24)
    with pytest.raises(ValueError, match=r"encoder\.high_image_size=64, but its tower is built for 56 px"):
        HybridEncoder(low=pair().low, high=tower(), high_image_size=64)
    with pytest.raises(ValueError, match="high_res_pixel_values is missing"):
        pair()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="2 pictures in pixel_values, 1 in high_res"):
        pair()(torch.zeros(2, 3, 16, 16), high_res_pixel_values=torch.zeros(1, 3, 56, 56))
    with pytest.raises(ValueError, match="must be even"):
        HybridMLP(encoder_dims=(4, 4), decoder_dim=7)
    with pytest.raises(ValueError, match="9 tokens and the high one 4"):
        HybridMLP(encoder_dims=(4, 4), decoder_dim=8)([torch.zeros(1, 9, 4), torch.zeros(1, 4, 4)])
