"""Shared layers against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_internvl.layers.basic import (
    AttentionPooling,
    DropPath,
    LayerNorm,
    RMSNorm,
    init_normal,
    merge_heads,
    resize_positions,
    rotary_table,
    rotate,
    split_heads,
)


def test_rms_norm_is_the_formula_in_float32() -> None:
    norm = RMSNorm(6, eps=0.5)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(norm(x), expected)
    big = torch.full((1, 6), 300.0, dtype=torch.float16)  # its square does not fit into float16
    torch.testing.assert_close(norm.half()(big), norm.weight[None])


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_norms_give_the_type_that_they_read_and_compute_in_float32(kind: type[nn.Module], weights: torch.dtype) -> None:
    norm, x = kind(64), torch.randn(3, 64)
    nn.init.normal_(norm.weight)
    expected = norm(x)
    norm.to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        low, high = norm(x.bfloat16()), norm(x)
    assert (low.dtype, high.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(low.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(high, expected, rtol=1e-2, atol=1e-2)


def test_drop_path_does_nothing_in_evaluation_and_at_rate_zero() -> None:
    x = torch.randn(50, 4)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    x = torch.ones(4000, 2, 3)
    out = DropPath(0.25).train()(x)
    dropped = (out == 0).all(dim=(1, 2))
    assert out[~dropped].allclose(torch.tensor(1 / 0.75))
    assert 0.22 < dropped.float().mean() < 0.28


def test_drop_path_scales_features_in_the_type_of_the_branch() -> None:
    branch, scale = torch.randn(400, 2, 3), torch.randn(3)
    assert DropPath(0.9).eval()(branch, scale).equal(branch * scale)
    torch.manual_seed(0)
    expected = DropPath(0.25).train()(branch * scale)
    torch.manual_seed(0)
    torch.testing.assert_close(DropPath(0.25).train()(branch, scale), expected)
    assert DropPath(0.25).train()(branch.bfloat16(), scale).dtype == torch.bfloat16


def test_rotary_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8)
    table = rotary_table(torch.arange(12), 8, 100.0)
    rotated_q, rotated_k = (rotate(x.expand(1, 1, 12, 8), table)[0, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T
    for distance in (-5, 0, 3):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0, 0], scores[0, 1])
    torch.testing.assert_close(rotated_q[0], q[0, 0, 0])


def test_rotary_turns_each_pair_by_its_own_angle() -> None:
    x = torch.tensor([1.0, 1.0, 0.0, 0.0])  # two pairs, half-split: (x0, x2) and (x1, x3)
    out = rotate(x.reshape(1, 1, 1, 4), rotary_table(torch.tensor([3]), 4, 100.0)).flatten()
    angles = torch.tensor([3.0, 3.0 / 100.0**0.5])
    torch.testing.assert_close(out, torch.cat([angles.cos(), angles.sin()]))


def ramp(grid: int) -> Tensor:
    """A table that grows evenly to the right (first feature) and downwards (second), with a CLS entry of its own."""
    places = (torch.arange(grid) + 0.5) / grid
    square = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1)
    return torch.cat([torch.full((1, 1, 2), 7.0), square.reshape(1, -1, 2)], dim=1)


def test_positions_keep_cls_and_directions_when_resized() -> None:
    resized = resize_positions(ramp(8), 12)
    assert resized.shape == (1, 145, 2)
    assert resized[:, 0].equal(torch.full((1, 2), 7.0))
    inner = (slice(2, -2), slice(2, -2))  # the edge cannot know how the ramp goes on
    ours, expected = (table[0, 1:].unflatten(0, (12, 12))[inner] for table in (resized, ramp(12)))
    torch.testing.assert_close(ours, expected, atol=2e-2, rtol=0)


def test_positions_of_the_same_size_are_left_alone_and_types_are_kept() -> None:
    table = torch.randn(1, 17, 4)
    assert resize_positions(table, 4) is table
    assert resize_positions(table.bfloat16(), 6).dtype == torch.bfloat16


def test_attention_pooling_is_one_query_per_head() -> None:
    pool = AttentionPooling(8, heads=2, out_dim=5)
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 7, 8)
    attn = pool.cross_attn
    for row in range(3):
        q = attn.q.weight @ pool.norm1_q(x[row].mean(dim=0)) + attn.q_bias
        k, v = (
            norm(x[row]) @ p.weight.T + b
            for norm, p, b in ((pool.norm1_k, attn.k, attn.k_bias), (pool.norm1_v, attn.v, attn.v_bias))
        )
        heads = [((k[:, s] @ q[s]) / 4**0.5).softmax(dim=0) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
        torch.testing.assert_close(pool(x)[row], attn.proj(torch.cat(heads)), rtol=1e-4, atol=1e-5)


def test_heads_are_split_and_merged_in_order() -> None:
    x = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2)
    assert heads[1, 2, 0].tolist() == x[1, 0, 4:6].tolist()
    assert merge_heads(heads).equal(x)


def test_init_normal_sets_weights_and_clears_biases() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Embedding(64, 64), nn.Conv2d(3, 64, 4), nn.LayerNorm(64))
    init_normal(module, std=0.3)
    for layer in module[:3]:
        assert layer.weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert not module[0].bias.any()
    assert not module[2].bias.any()
    assert module[3].weight.eq(1).all()
