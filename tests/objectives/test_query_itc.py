"""Contrast by the best query: the formula, its gradients with and without those of the other side, soft targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_internvl.objectives import QueryITC, similarities


def features() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)


def test_the_formula() -> None:
    image, text = features()
    scores = torch.stack([
        torch.stack([F.cosine_similarity(image[i], text[j][None], dim=-1).max() for j in range(4)]) for i in range(4)
    ]) / 0.05  # fmt: skip
    rows = torch.arange(4)
    expected = (F.cross_entropy(scores, rows, label_smoothing=0.1) + F.cross_entropy(scores.T, rows, label_smoothing=0.1)) / 2
    torch.testing.assert_close(QueryITC(init_temp=0.05, label_smoothing=0.1)(image, text), expected)


def test_with_one_query_it_is_a_plain_contrast() -> None:
    image, text = features()
    assert similarities(image[:, 0], text).equal(similarities(image[:, :1], text))


def test_gradients_of_the_other_side_are_an_option() -> None:
    image, text = features()
    full, halves = (QueryITC(gather_gradient=g) for g in (True, False))
    losses = full(image, text), halves(image, text)
    assert losses[0].equal(losses[1])
    both, own = (torch.autograd.grad(loss, [image, text]) for loss in losses)
    assert not torch.allclose(both[0], own[0])
    normal_image, normal_text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    to_text = F.cross_entropy(full.logits(normal_image, normal_text.detach()), torch.arange(4)) / 2
    torch.testing.assert_close(own[0], torch.autograd.grad(to_text, image)[0])


def test_rows_of_the_same_picture_share_the_target() -> None:
    image, text = features()
    ids = torch.tensor([5, 6, 5, 7])
    scores = QueryITC().logits(F.normalize(image, dim=-1), F.normalize(text, dim=-1))
    same = (ids[:, None] == ids).float()
    targets = same / same.sum(dim=1, keepdim=True)
    expected = (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2
    torch.testing.assert_close(QueryITC()(image, text, image_ids_B=ids), expected)


def test_ignored_rows_are_compared_with_but_not_judged() -> None:
    image, text = features()
    scores = QueryITC().logits(F.normalize(image, dim=-1), F.normalize(text, dim=-1))
    judged = torch.tensor([0, 2, 3])
    expected = (F.cross_entropy(scores[judged], judged) + F.cross_entropy(scores.T[judged], judged)) / 2
    torch.testing.assert_close(QueryITC()(image, text, torch.tensor([False, True, False, False])), expected)


def test_the_temperature() -> None:
    image, text = features()
    contrast = QueryITC(min_temp=0.05)
    contrast.temp.data.fill_(0.001)
    contrast(image, text)
    torch.testing.assert_close(contrast.temp.data, torch.tensor([0.05]))
    fixed = QueryITC(init_temp=1.0, learnable=False)
    assert not list(fixed.parameters())
    assert not fixed.state_dict()
    with pytest.raises(ValueError, match=r"init_temp=0\.0 must lie above 0"):
        QueryITC(init_temp=0.0)


@pytest.mark.parametrize("gather_gradient", [True, False])
@pytest.mark.parametrize(("ignored", "ids"), [(None, None), ([False, True, False, False], [5, 6, 5, 7])])
def test_chunks_change_neither_loss_nor_gradients(
    ignored: list[bool] | None, ids: list[int] | None, gather_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [None if x is None else torch.tensor(x) for x in (ignored, ids)]
    found, sizes = [], []
    for chunk in (None, 3, 1):
        objective, leaves = QueryITC(gather_gradient=gather_gradient, label_smoothing=0.1, chunk=chunk), features()
        compared = objective.logits
        monkeypatch.setattr(objective, "logits", lambda *x, of=compared: sizes.append(of(*x).numel()) or of(*x))
        loss = objective(*leaves, *options)
        found.append([loss, *torch.autograd.grad(loss, [*leaves, objective.temp])])
    assert sizes[:2] == [16, 16]
    assert max(sizes[-8:]) == 4
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])


def test_a_chunk_that_is_none() -> None:
    with pytest.raises(ValueError, match="chunk=0 must be a whole number above 0"):
        QueryITC(chunk=0)
