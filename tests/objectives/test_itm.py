"""Matching, and the wrong captions it learns from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lightning_internvl.objectives import ITM, mined_negatives, other_pictures, random_negatives


def test_the_mean_over_queries_decides() -> None:
    itm = ITM(dim=6)
    queries, labels = torch.randn(4, 3, 6), torch.tensor([0, 1, 1, 0])
    expected = torch.stack([itm.itm_head(row).mean(dim=0) for row in queries])
    torch.testing.assert_close(itm.logits(queries), expected)
    torch.testing.assert_close(itm(queries, labels), F.cross_entropy(expected, labels))


def test_rows_without_a_label_count_for_nothing() -> None:
    itm = ITM(dim=6)
    queries = torch.randn(4, 3, 6)
    torch.testing.assert_close(itm(queries, torch.tensor([0, -100, 1, -100])), itm(queries[[0, 2]], torch.tensor([0, 1])))


def test_a_mined_negative_is_never_the_own_caption_however_alike() -> None:
    similarity = torch.eye(5) * 1000
    drawn = torch.stack([mined_negatives(similarity) for _ in range(200)])
    assert not (drawn == torch.arange(5)).any()
    for row in range(5):
        assert set(drawn[:, row].tolist()) == set(range(5)) - {row}


def test_mined_negatives_prefer_captions_that_are_alike() -> None:
    similarity = torch.zeros(4, 4)
    similarity[0, 2] = similarity[3, 1] = 4.0
    drawn = torch.stack([mined_negatives(similarity) for _ in range(300)])
    assert (drawn[:, 0] == 2).float().mean() > 0.9
    assert (drawn[:, 3] == 1).float().mean() > 0.9
    assert (drawn[:, 1] == 2).float().mean() < 0.5


def test_random_negatives_are_every_caption_but_the_own() -> None:
    drawn = torch.stack([random_negatives(4, torch.device("cpu")) for _ in range(300)])
    assert not (drawn == torch.arange(4)).any()
    for row in range(4):
        counts = drawn[:, row].bincount(minlength=4)
        assert counts[row] == 0
        assert counts[counts > 0].min() > 60
        assert (counts > 0).sum() == 3


def test_a_negative_is_never_a_caption_of_the_same_picture() -> None:
    others = other_pictures(torch.tensor([5, 5, 3, 5, 8]))
    similarity = torch.full((5, 5), 100.0).masked_fill(others, 0.0)
    for draw in (lambda: mined_negatives(similarity, others), lambda: random_negatives(5, torch.device("cpu"), others)):
        drawn = torch.stack([draw() for _ in range(400)])
        for row, allowed in enumerate(others):
            counts = drawn[:, row].bincount(minlength=5)
            assert counts[~allowed].sum() == 0
            assert counts[allowed].min() > 0.6 * 400 / int(allowed.sum()), "what may be drawn is drawn evenly"


def test_a_picture_without_any_other_draws_something_that_the_stage_leaves_out() -> None:
    others = other_pictures(torch.tensor([5, 5, 5]))
    assert not others.any()
    for drawn in (mined_negatives(torch.randn(3, 3), others), random_negatives(3, torch.device("cpu"), others)):
        assert drawn.shape == (3,)
        assert (drawn != torch.arange(3)).all()
