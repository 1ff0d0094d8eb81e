"""The towers of CLIP and SigLIP: shapes, layers, masking, other sizes, bad input. Numbers: tests/checkpoints/test_clip.py."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.protocols import Encoder

SIZES = {"image_size": 24, "patch_size": 6, "dim": 16, "depth": 3, "heads": 2, "mlp_dim": 32}
PIXELS = torch.randn(2, 3, 24, 24)


@pytest.mark.parametrize(
    ("tower", "tokens", "special"),
    [
        (CLIPViT(**SIZES), 17, 1),
        (SiglipViT(**SIZES), 17, 1),
        (SiglipViT(**SIZES, head="unused"), 16, 0),
        (SiglipViT(**SIZES, head="none"), 16, 0),
    ],
)
def test_shapes_and_tokens(tower: CLIPViT, tokens: int, special: int) -> None:
    assert isinstance(tower, Encoder)
    assert (tower.num_tokens(), tower.num_tokens(48), tower.special_tokens) == (tokens, 64 + special, special)
    (states,) = tower(PIXELS)
    assert states.shape == (2, tokens, 16)
    assert len(tower.sharding_units()) == 3


def test_patches_have_the_same_places_in_all_layers() -> None:
    tower, plain = SiglipViT(**SIZES), SiglipViT(**SIZES, head="none")
    plain.load_state_dict({n: t for n, t in tower.state_dict().items() if not n.startswith("head.")})
    for state, expected in zip(tower(PIXELS, layers=(1, -1)), plain(PIXELS, layers=(1, -1)), strict=True):
        assert state[:, 1:].equal(expected)


def test_a_pooling_head_is_there_or_not() -> None:
    names = {head: {n for n, _ in SiglipViT(**SIZES, head=head).named_parameters()} for head in ("first", "unused", "none")}
    assert names["first"] == names["unused"]
    assert names["first"] - names["none"] == {n for n in names["first"] if n.startswith("head.")}


def test_layers_are_numbered_as_in_hugging_face() -> None:
    tower = CLIPViT(**SIZES)
    states = tower(PIXELS, layers=(0, 1, -2, 3, -1))
    assert states[2].equal(tower(PIXELS, layers=(2,))[0])
    assert states[3].equal(states[4])
    assert states[0].equal(tower.pre_layrnorm(tower.embeddings(PIXELS)))
    with pytest.raises(ValueError, match=r"layers \[4\] do not exist; with 3 blocks"):
        tower(PIXELS, layers=(4,))


def test_the_last_norm_is_put_on_what_it_is_for() -> None:
    tower = CLIPViT(**SIZES)
    torch.nn.init.normal_(tower.post_layernorm.weight)
    (cls,) = tower(PIXELS)
    tower.post_norm = "unused"
    (raw,) = tower(PIXELS)
    assert cls[:, 1:].equal(raw[:, 1:])
    assert cls[:, 0].equal(tower.post_layernorm(raw[:, 0]))
    (states,) = SiglipViT(**SIZES, head="none")(PIXELS)
    torch.testing.assert_close(states.mean(dim=-1), torch.zeros(2, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tower", "tokens"), [(CLIPViT(**SIZES), 9), (SiglipViT(**SIZES, head="none"), 8)])
def test_half_of_the_patches_can_be_left_out(tower: CLIPViT, tokens: int) -> None:
    torch.manual_seed(0)
    first = tower(PIXELS, keep=0.5)[0]
    assert first.shape == (2, tokens, 16)
    torch.manual_seed(0)
    assert tower(PIXELS, keep=0.5)[0].equal(first)


def test_other_sizes_resize_the_positions_and_can_be_stored() -> None:
    for tower in (CLIPViT(**SIZES), SiglipViT(**SIZES)):
        pixels = torch.randn(1, 3, 36, 36)
        (expected,) = tower(pixels)
        assert tower(torch.randn(1, 3, 12, 48))[0].shape == (1, 17, 16)
        tower.resize(36)
        assert tower.image_size == 36
        assert tower.embeddings.position_embedding.shape[1] == 36 + tower.embeddings.special
        torch.testing.assert_close(tower(pixels)[0], expected)


def test_every_part_that_is_used_gets_a_gradient() -> None:
    for tower in (CLIPViT(**SIZES), SiglipViT(**SIZES)):
        tower(PIXELS)[0].square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in tower.named_parameters() if "k_proj.bias" not in n)


def test_it_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        for tower in (CLIPViT(**SIZES), SiglipViT(**SIZES)):
            assert tower(torch.empty(2, 3, 24, 24))[0].shape == (2, 17, 16)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (CLIPViT, {"heads": 3}, "dim=16 must divide by heads=3"),
        (CLIPViT, {"act": "relu"}, "'relu' is not known; valid choices: quick_gelu, gelu, gelu_pytorch_tanh"),
        (CLIPViT, {"post_norm": "some"}, "post_norm='some' is not possible"),
        (CLIPViT, {"cls": False}, "post_norm='cls' is not possible with cls=False"),
        (SiglipViT, {"head": "last"}, "head='last' is not known; valid choices: first, unused, none"),
    ],
)
def test_settings_that_do_not_fit(kind: type[CLIPViT], change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**SIZES | change)


def test_what_is_left_behind_the_last_whole_patch_is_not_seen() -> None:
    tower, pixels = CLIPViT(**SIZES | {"image_size": 29}), torch.randn(1, 3, 29, 29)
    assert tower.num_tokens() == 17
    assert tower(pixels)[0].equal(tower(pixels[..., :24, :24])[0])
    with pytest.raises(ValueError, match="5 x 24 pixels: both sides must hold a patch of 6"):
        tower(torch.randn(1, 3, 5, 24))
