"""Masks described by lengths: the dense reference by brute force, and what each library makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_internvl.layers import attention_masks as masks
from lightning_internvl.layers.attention_kernels import block_mask, cumulative_lengths, xformers_bias
from lightning_internvl.layers.attention_masks import Mask, Piece

CPU = torch.device("cpu")
SEGMENTS = [[3, 4, 2], [5], [1, 1, 8]]
EQUAL = [[3, 3, 2, 2], [4, 4], [1, 8, 1]]
# Every kind of mask, three rows each, and who may look at whom, written out for one row, query and key.
KINDS: dict[str, tuple[Mask, Callable[[int, int, int], bool]]] = {
    "causal": (masks.packed([[10]] * 3, 10), lambda row, q, k: k <= q),
    "packed": (masks.packed(SEGMENTS, 10), lambda row, q, k: k <= q and sample(row, q) == sample(row, k) >= 0),
    "packed, both ways": (masks.packed(SEGMENTS, 10, causal=False), lambda row, q, k: sample(row, q) == sample(row, k) >= 0),
    "of equal lengths": (
        masks.packed(EQUAL, 10),
        lambda row, q, k: k <= q and sample(row, q, EQUAL) == sample(row, k, EQUAL) >= 0,
    ),
    "padded": (masks.packed([[10], [4], [1]], 10, causal=False), lambda row, q, k: max(q, k) < [10, 4, 1][row]),
    "padded, causal": (masks.packed([[10], [4], [1]], 10), lambda row, q, k: k <= q < [10, 4, 1][row]),
    "prefix": (masks.prefix([4, 0, 3], [10, 6, 3], 10), lambda row, q, k: q < [10, 6, 3][row] and k <= max(q, [3, -1, 2][row])),
    "runs of keys": (
        Mask(
            tuple(
                (Piece((0, 2), ((0, 2),)), Piece((2, 2 + n), ((2, 2 + n),)), Piece((6, 6 + m), ((0, 2), (6, 6 + m)), causal=True))
                for n, m in ((4, 1), (2, 3), (1, 4))
            ),
            10,
            10,
        ),
        lambda row, q, k: (
            k < 2
            if q < 2
            else min(q, k) >= 2 and max(q, k) < 2 + [4, 2, 1][row]
            if q < 6
            else (k < 2 or 6 <= k <= q) and q < 6 + [1, 3, 4][row]
        ),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def sample(row: int, place: int, segments: list[list[int]] = SEGMENTS) -> int:
    """Which sample of the packed rows a place belongs to; -1 for padding."""
    flat = [index for index, length in enumerate(segments[row]) for _ in range(length)]
    return flat[place] if place < len(flat) else -1


@kinds
def test_the_dense_mask_is_what_it_says(kind: str) -> None:
    mask, looks = KINDS[kind]
    expected = [[[[looks(row, q, k) for k in range(mask.keys)] for q in range(mask.queries)]] for row in range(len(mask.rows))]
    assert mask.dense().tolist() == expected
    assert mask.shape == tuple(mask.dense().shape)
    assert mask.ndim == 4


@kinds
def test_xformers_masks_are_the_dense_one(kind: str) -> None:
    pytest.importorskip("xformers")
    mask, _ = KINDS[kind]
    rows = mask.dense()[:, 0]
    # What is side by side is a part of one square of all rows.
    square = torch.block_diag(*(row.int() for row in rows)).bool()
    seen = torch.zeros(len(square), dtype=torch.bool)
    for group in mask.varlen(CPU):
        bias = xformers_bias(group, CPU)
        allowed = bias.materialize((sum(group.queries), sum(group.keys))) == 0
        queries = all_or(group.query_places, square.shape[0])
        keys = all_or(group.key_places, square.shape[1])
        found = torch.zeros(len(queries), square.shape[1], dtype=torch.int)
        found.index_add_(1, keys, allowed.int())  # keys that two pieces see are there twice
        assert torch.equal(found.bool(), square[queries])
        assert int(found.max()) == 1
        seen[queries] = True
    assert torch.equal(seen, square.any(dim=1))


def all_or(places: Tensor | None, count: int) -> Tensor:
    return torch.arange(count) if places is None else places


def test_pieces_of_one_length_that_follow_each_other_are_told() -> None:
    mask = masks.packed(EQUAL, 10)
    told = [[(piece.queries, count) for piece, count in mask.alike(row)] for row in range(3)]
    assert told == [[((0, 3), 2), ((6, 8), 2)], [((0, 4), 2)], [((0, 1), 1), ((1, 9), 1), ((9, 10), 1)]]
    apart = Mask(((Piece((0, 2), ((0, 2),)), Piece((3, 5), ((3, 5),)), Piece((5, 7), ((3, 5),))),), 10, 10)
    assert [count for _, count in apart.alike(0)] == [1, 1, 1]


def test_full_rows_are_read_where_they_lie() -> None:
    (group,) = masks.packed([[4, 6], [10]], 10).varlen(CPU)
    assert group.query_places is None
    assert group.key_places is None
    assert group.queries == group.keys == [4, 6, 10]
    assert cumulative_lengths(group.queries).tolist() == [0, 4, 10, 20]


@kinds
def test_flex_looks_where_the_dense_mask_does(kind: str) -> None:
    from torch.nn.attention.flex_attention import create_mask

    mask, _ = KINDS[kind]
    assert torch.equal(create_mask(mask.sees(CPU), *mask.shape, device="cpu"), mask.dense())


def test_flex_leaves_out_empty_blocks() -> None:
    mask = masks.packed([[128, 128, 256]], 512)
    assert block_mask(mask, CPU).to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_what_a_device_was_given_is_made_once() -> None:
    mask = masks.packed(SEGMENTS, 10)
    assert mask.varlen(CPU) is mask.varlen(CPU)
    assert mask.dense() is mask.dense("cpu")
    assert mask == masks.packed(SEGMENTS, 10)  # whatever was made of it


def test_positions_and_starts() -> None:
    assert masks.positions([[3, 2], [4]], 6).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert masks.starts([[3, 2], [4]], 6).tolist() == [[0, 0, 0, 3, 3, 5], [0, 0, 0, 0, 4, 5]]


def test_first_tokens_have_no_label() -> None:
    labels = torch.arange(12).view(2, 6)
    assert masks.without_firsts(labels, [[3, 2], [4]]).tolist() == [[-100, 1, 2, -100, 4, 5], [-100, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("segments", "message"),
    [([[3], [4, 7]], r"row 1 are \[4, 7\]; .* at most 10"), ([[3, 0]], r"row 0 are \[3, 0\]; each must be 1 or more")],
)
def test_segments_that_do_not_fit_are_named(segments: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks.packed(segments, 10)


def test_a_prefix_longer_than_its_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a prefix of 5 tokens does not fit a row of 4"):
        masks.prefix([5], [4], 6)
