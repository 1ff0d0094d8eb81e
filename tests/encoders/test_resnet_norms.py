"""CLIP's ResNet as a part: which statistics its norms use, sizes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_internvl.encoders.clip_resnet import BatchNorm, CLIPResNet
from lightning_internvl.layers.state_dict import own_tensors


def tower(**options: object) -> CLIPResNet:
    torch.manual_seed(0)
    return CLIPResNet(**{"image_size": 64, "width": 4, "depths": (1, 1, 1, 1), **options})


def averages(encoder: CLIPResNet) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in encoder.named_buffers()}


def moved(before: dict[str, Tensor], encoder: CLIPResNet) -> set[bool]:
    return {not before[name].equal(buffer) for name, buffer in encoder.named_buffers()}


def test_norms_that_train_use_the_pictures_of_the_step_and_move_their_averages() -> None:
    encoder, pixels = tower().train(), torch.randn(4, 3, 64, 64)
    before = averages(encoder)
    (together,) = encoder(pixels)
    assert moved(before, encoder) == {True}
    halves = torch.cat([encoder(half)[0] for half in pixels.chunk(2)])
    assert not torch.allclose(together, halves, atol=1e-3)  # micro-batches are normalised apart


def test_evaluation_and_frozen_norms_use_averages_and_leave_them() -> None:
    encoder, pixels = tower().train(), torch.randn(4, 3, 64, 64)
    encoder(pixels)
    for ready in (encoder.eval(), encoder.train().requires_grad_(False)):
        before = averages(ready)
        (together,) = ready(pixels)
        torch.testing.assert_close(together, torch.cat([ready(one[None])[0] for one in pixels]))
        assert moved(before, ready) == {False}


def test_the_norm_is_that_of_pytorch() -> None:
    ours, theirs = BatchNorm(5), torch.nn.BatchNorm2d(5)
    x = torch.randn(3, 5, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_averages_are_among_the_tensors_of_a_checkpoint() -> None:
    assert {"bn1.running_mean", "layer4.0.downsample.1.running_var"} <= own_tensors(tower()).keys()


def test_tokens_and_the_pooled_vector_before_them() -> None:
    encoder, bare = tower().eval(), tower(head="none").eval()
    bare.load_state_dict({name: x for name, x in encoder.state_dict().items() if not name.startswith("attnpool")})
    pixels = torch.randn(2, 3, 96, 64)  # another size than that of the positions
    (found,), (tokens,) = encoder(pixels), bare(pixels)
    assert found.shape == (2, 1 + 3 * 2, 128)
    assert found[:, 1:].equal(tokens)
    assert (encoder.num_tokens(), bare.num_tokens(128)) == (5, 16)
    assert len(encoder.sharding_units()) == 4
    encoder.train()(torch.randn(2, 3, 64, 64))[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_what_it_refuses_is_named() -> None:
    with pytest.raises(ValueError, match=r"a ResNet gives its last map, whole: layers=\(-2,\).*middleware\.patch_layer=-1"):
        tower()(torch.zeros(1, 3, 64, 64), layers=(-2,))
    with pytest.raises(ValueError, match=r"images of \(64, 70\) pixels: both sides must divide by 32"):
        tower()(torch.zeros(1, 3, 64, 70))
    with pytest.raises(ValueError, match="head='mean'"):
        tower(head="mean")
    with pytest.raises(ValueError, match=r"four stages.*depths=\[1, 1\]"):
        tower(depths=(1, 1))
