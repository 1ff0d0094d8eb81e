"""Image-text contrast against a slow, obvious version."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.objectives import ITC


def slow(image: Tensor, text: Tensor, scale: float, smoothing: float = 0.0, judged: list[int] | None = None) -> float:
    """Pair by pair, from the definition."""
    rows = range(len(image)) if judged is None else judged
    cosine = [[float(i @ t / (i.norm() * t.norm())) for t in text] for i in image]
    losses = []
    for direction in (cosine, [list(column) for column in zip(*cosine, strict=True)]):
        for row in rows:
            odds = [math.exp(scale * c) for c in direction[row]]
            logs = [math.log(odd / sum(odds)) for odd in odds]
            losses.append(-(1 - smoothing) * logs[row] - smoothing * sum(logs) / len(logs))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("scale", "smoothing"), [(1 / 0.07, 0.0), (3.0, 0.0), (3.0, 0.1)])
def test_loss_is_the_definition(scale: float, smoothing: float) -> None:
    image, text = torch.randn(2, 5, 6)
    assert ITC(init_scale=scale, label_smoothing=smoothing)(image, text).item() == pytest.approx(
        slow(image, text, scale, smoothing), rel=1e-4
    )


def test_gradients_flow_to_both_sides_of_every_comparison() -> None:
    itc = ITC(init_scale=3.0)
    tensors = [*torch.randn(2, 5, 6).requires_grad_().unbind(), itc.logit_scale]
    logits = itc.logit_scale.exp() * torch.cosine_similarity(tensors[0][:, None], tensors[1], dim=-1)
    plain = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    for ours, expected in zip(*(torch.autograd.grad(x, tensors) for x in (itc(*tensors[:2]), plain)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_lengths_of_the_vectors_do_not_matter() -> None:
    image, text = torch.randn(2, 5, 6)
    torch.testing.assert_close(ITC()(image, text), ITC()(image * 7, text * torch.rand(5, 1)))


def test_ignored_pairs_are_compared_with_but_not_judged() -> None:
    image, text = torch.randn(2, 5, 6)
    ignored = torch.tensor([False, True, False, False, True])
    loss = ITC(init_scale=3.0, label_smoothing=0.1)(image, text, ignored)
    assert loss.item() == pytest.approx(slow(image, text, 3.0, 0.1, judged=[0, 2, 3]), rel=1e-4)
    nobody = ITC(init_scale=3.0, label_smoothing=0.1)(image, text, torch.zeros(5, dtype=torch.bool))
    assert nobody.item() == pytest.approx(slow(image, text, 3.0, 0.1), rel=1e-4)


def test_rows_of_one_picture_match_each_other_to_equal_shares() -> None:
    image, text = torch.randn(2, 5, 6)
    ids = torch.tensor([4, 9, 4, 4, 2])
    cosine = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    total = 0.0
    for logits in (3.0 * cosine, 3.0 * cosine.T):
        for row, logs in enumerate(logits.log_softmax(dim=-1)):
            same = [column for column in range(5) if ids[column] == ids[row]]
            total -= sum(float(logs[column]) for column in same) / len(same)
    assert ITC(init_scale=3.0)(image, text, image_ids_B=ids).item() == pytest.approx(total / 10, rel=1e-5)
    nobody = torch.zeros(5, dtype=torch.bool)
    assert ITC(init_scale=3.0)(image, text, nobody, ids).item() == pytest.approx(total / 10, rel=1e-5)


def test_different_pictures_are_the_plain_case() -> None:
    image, text = torch.randn(2, 5, 6)
    ids = torch.tensor([4, 9, 1, 7, 2])
    torch.testing.assert_close(ITC(label_smoothing=0.1)(image, text, image_ids_B=ids), ITC(label_smoothing=0.1)(image, text))


def test_the_scale_is_bounded_and_can_be_sharded() -> None:
    itc = ITC(init_scale=20.0, max_scale=50.0)
    assert itc.logit_scale.shape == (1,)
    assert itc.scale.item() == pytest.approx(20.0, rel=1e-5)
    with torch.no_grad():
        itc.logit_scale += 5
    itc(*torch.randn(2, 4, 6)).backward()
    assert itc.scale.item() == pytest.approx(50.0, rel=1e-5)
    assert itc.logit_scale.grad.abs() > 0  # at the limit it can still come down
    free = ITC(max_scale=math.inf)
    with torch.no_grad():
        free.logit_scale.fill_(math.log(300.0))
    assert free.scale.item() == pytest.approx(300.0, rel=1e-5)
