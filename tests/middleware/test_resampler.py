"""The resampler of Qwen-VL: positions, sizes, what attends to what."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.middleware.resampler import Resampler, sincos_positions
from lightning_internvl.protocols import Middleware


def resampler(**change: object) -> Resampler:
    torch.manual_seed(0)
    return Resampler(**{"encoder_dim": 10, "decoder_dim": 32, "num_queries": 4, "head_dim": 16, "special_tokens": 0} | change)


def test_positions_tell_the_column_first() -> None:
    table = sincos_positions(16, 3)
    assert table.shape == (9, 16)
    rows = table.unflatten(0, (3, 3))
    assert rows[0, 1, :8].equal(rows[2, 1, :8])  # the same column
    assert rows[1, 0, 8:].equal(rows[1, 2, 8:])  # the same row
    expected = torch.tensor([1.0, 10000 ** -(1 / 4), 10000 ** -(2 / 4), 10000 ** -(3 / 4)]) * 2
    torch.testing.assert_close(rows[0, 2, :4], expected.sin())
    torch.testing.assert_close(rows[0, 2, 4:8], expected.cos())


def test_as_many_tokens_as_queries_at_any_size() -> None:
    middleware = resampler()
    assert isinstance(middleware, Middleware)
    for patches in (4, 9, 25):
        assert middleware([torch.randn(2, patches, 10)]).shape == (2, middleware.tokens_out(patches), 32) == (2, 4, 32)


def test_special_tokens_are_left_out() -> None:
    middleware, x = resampler(special_tokens=1), torch.randn(1, 5, 10)
    other = torch.cat([torch.randn(1, 1, 10), x[:, 1:]], dim=1)
    assert middleware([x]).equal(middleware([other]))


def test_everything_but_the_table_trains() -> None:
    middleware = resampler()
    middleware([torch.randn(2, 9, 10)]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in middleware.named_parameters() if n != "k_proj.bias")
    assert "positions" in middleware.state_dict()
    assert "positions" not in dict(middleware.named_parameters())


def test_it_sees_where_patches_are() -> None:
    middleware, x = resampler(init_std=0.5), torch.randn(1, 9, 10)
    assert not torch.allclose(middleware([x]), middleware([x.flip(1)]), atol=1e-3)


def test_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        middleware = resampler()
        assert middleware([torch.zeros(1, 16, 10)]).shape == (1, 4, 32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"num_queries": 5}, "num_queries=5 must be a square"), ({"head_dim": 12}, "width 32 must divide by head_dim=12")],
)
def test_sizes_that_do_not_fit(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        resampler(**change)


def test_patches_that_are_no_square() -> None:
    with pytest.raises(ValueError, match="7 patches are no square grid"):
        resampler()([torch.zeros(1, 7, 10)])
