"""The plain connector."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.middleware.connector import LinearConnector, MLPConnector
from lightning_internvl.protocols import Middleware


def test_patches_go_through_and_cls_does_not() -> None:
    connector = MLPConnector(encoder_dim=6, decoder_dim=10, patch_layer=-2)
    assert isinstance(connector, Middleware)
    assert connector.layers == (-2,)
    feats = torch.randn(2, 17, 6)
    out = connector([feats])
    assert out.shape == (2, connector.tokens_out(17), 10) == (2, 16, 10)
    other_cls = feats.clone()
    other_cls[:, 0] += 1
    assert connector([other_cls]).equal(out)
    torch.testing.assert_close(out[1, 3], connector.mlp1(feats[1, 4]))


def test_parameters_have_the_names_of_llama_family_checkpoints() -> None:
    names = {name: tuple(p.shape) for name, p in MLPConnector(encoder_dim=6, decoder_dim=10).named_parameters()}
    assert names == {"mlp1.0.weight": (10, 6), "mlp1.0.bias": (10,), "mlp1.2.weight": (10, 10), "mlp1.2.bias": (10,)}


@pytest.mark.parametrize(("special", "kept", "tokens"), [(1, False, 4), (0, False, 5), (1, True, 5)])
def test_tokens_in_front_of_the_patches(special: int, kept: bool, tokens: int) -> None:
    feats = [torch.randn(2, 5, 8), torch.randn(2, 5, 8)]
    for kind in (MLPConnector, LinearConnector):
        connector = kind(encoder_dim=8, decoder_dim=6, patch_layer=(-2, -1), special_tokens=special, keep_special=kept)
        assert connector.layers == (-2, -1)
        assert connector.tokens_out(5) == tokens
        side_by_side = torch.cat([states[:, 5 - tokens :] for states in feats], dim=-1)
        project = connector.mlp1 if kind is MLPConnector else connector.proj
        assert connector(feats).equal(project(side_by_side))


def test_depth_and_biases_of_an_mlp() -> None:
    names = {n for n, _ in MLPConnector(encoder_dim=8, decoder_dim=6, depth=3, bias=False).named_parameters()}
    assert names == {"mlp1.0.weight", "mlp1.2.weight", "mlp1.4.weight"}
    with pytest.raises(ValueError, match="1 or more layers: depth=0"):
        MLPConnector(encoder_dim=8, decoder_dim=6, depth=0)
