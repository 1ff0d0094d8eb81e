"""The perceive sampler of XComposer and the concatenating connector of MiniGPT-4: shapes, order, gradients, bad input."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.middleware.concat import ConcatConnector
from lightning_internvl.middleware.perceive_sampler import PerceiveSampler

SIZES = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "num_queries": 3}


def test_flags_stand_around_the_queries_and_start_at_zero() -> None:
    torch.manual_seed(0)
    sampler = PerceiveSampler(encoder_dim=8, decoder_dim=20, **SIZES).eval()
    feats = torch.randn(2, 5, 8)
    tokens = sampler([feats])
    assert tokens.shape == (2, sampler.tokens_out(5), 20) == (2, 5, 20)
    assert not tokens[:, [0, -1]].any()
    assert tokens[:, 1:-1].equal(sampler.proj(sampler.query(feats)))
    with torch.no_grad():
        sampler.flag_start.fill_(1.0)
        sampler.flag_end.fill_(2.0)
    tokens = sampler([feats])
    assert (tokens[:, 0] == 1).all()
    assert (tokens[:, -1] == 2).all()
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in sampler.parameters())


def test_patches_that_follow_each_other_become_one_token() -> None:
    torch.manual_seed(0)
    connector = ConcatConnector(encoder_dim=6, decoder_dim=10, concat=4)
    feats = torch.randn(2, 17, 6)  # CLS and 4 x 4 patches
    found = connector([feats])
    assert found.shape == (2, connector.tokens_out(17), 10) == (2, 4, 10)
    normed = connector.ln_vision(feats)
    row = torch.cat([normed[:, 1 + i] for i in range(4, 8)], dim=-1)  # the second row of the picture
    torch.testing.assert_close(found[:, 1], connector.proj(row))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="16 patches do not divide by 5"):
        ConcatConnector(encoder_dim=6, decoder_dim=10, concat=5)([torch.randn(1, 17, 6)])
    with pytest.raises(ValueError, match="concat=0"):
        ConcatConnector(encoder_dim=6, decoder_dim=10, concat=0)
    with pytest.raises(ValueError, match=r"dim=16 must divide by heads=3"):
        PerceiveSampler(encoder_dim=8, decoder_dim=20, **(SIZES | {"heads": 3}))
