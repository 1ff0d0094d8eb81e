"""The plain connector."""

from __future__ import annotations

import torch

from lightning_internvl.middleware.connector import MLPConnector
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
