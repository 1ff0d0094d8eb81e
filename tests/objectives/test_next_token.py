"""Next-token prediction equals the plain cross-entropy over all logits, at the cost of the labelled ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.objectives import NextToken
from lightning_internvl.objectives.next_token import labelled_tokens


def example() -> tuple[Tensor, Tensor, nn.Linear]:
    labels = torch.randint(0, 9, (3, 7))
    labels[0, :4] = labels[1, 5:] = labels[2, 0] = -100
    return torch.randn(3, 7, 5, requires_grad=True), labels, nn.Linear(5, 9)


def test_loss_and_gradients_equal_those_of_full_logits() -> None:
    hidden, labels, head = example()
    ours = NextToken()(hidden, labels, head)
    full = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(ours, full)
    tensors = [hidden, head.weight, head.bias]
    for ours_grad, full_grad in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(full, tensors), strict=True):
        torch.testing.assert_close(ours_grad, full_grad)


def test_logits_are_computed_for_labelled_tokens_only() -> None:
    hidden, labels, head = example()
    rows = []
    NextToken()(hidden, labels, lambda states: rows.append(len(states)) or head(states))
    assert rows == [int((labels[:, 1:] != -100).sum())]


def test_a_batch_without_labels_gives_zero_and_a_zero_gradient() -> None:
    hidden, labels, head = example()
    loss = NextToken()(hidden, torch.full_like(labels, -100), head)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, [hidden, head.weight])[1].eq(0).all()


def test_half_precision_states_are_judged_in_float32() -> None:
    hidden, labels, head = example()
    assert NextToken()(hidden.bfloat16(), labels, head.bfloat16()).dtype == torch.float32


def test_a_count_that_the_host_knows_changes_nothing() -> None:
    labels = torch.tensor([[7, 1, -100, 2], [-100, -100, 3, -100]])
    hidden, head = torch.randn(2, 4, 5), nn.Linear(5, 9)
    assert NextToken()(hidden, labels, head, count=labelled_tokens(labels)).equal(NextToken()(hidden, labels, head))
    assert labelled_tokens(labels) == 3


@pytest.mark.parametrize(("average", "power"), [("sample", 1.0), ("square_root", 0.5)])
@pytest.mark.parametrize("chunk", [None, 3])
def test_samples_weigh_by_their_length(average: str, power: float, chunk: int | None) -> None:
    hidden, labels, head = example()
    losses = F.cross_entropy(head(hidden)[:, :-1].mT, labels[:, 1:], ignore_index=-100, reduction="none")
    lengths = (labels[:, 1:] != -100).sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    means = losses.sum(dim=1) / lengths
    expected = (means * lengths ** (1 - power)).sum() / (lengths ** (1 - power)).sum()
    objective = NextToken(average=average, chunk=chunk)
    ours = objective(hidden, labels, head)
    torch.testing.assert_close(ours, expected)
    assert objective.weight(labels) == pytest.approx(float((lengths ** (1 - power)).sum()))
    tensors = [hidden, head.weight, head.bias]
    for ours_grad, full_grad in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(ours_grad, full_grad)


def test_answers_weigh_alike_however_many_a_sample_has() -> None:
    hidden, _, head = example()
    labels = torch.full(hidden.shape[:2], -100)
    answers = [(0, 1, 2), (0, 4, 7), (1, 2, 3), (2, 1, hidden.shape[1])]  # row, first, end
    for row, first, end in answers:
        labels[row, first:end] = torch.arange(first, end)
    losses = F.cross_entropy(head(hidden)[:, :-1].mT, labels[:, 1:], ignore_index=-100, reduction="none")
    expected = torch.stack([losses[row, first - 1 : end - 1].mean() for row, first, end in answers]).mean()
    objective = NextToken(average="answer")
    torch.testing.assert_close(objective(hidden, labels, head), expected)
    assert objective.weight(labels) == pytest.approx(len(answers))


@pytest.mark.parametrize("average", ["token", "sample", "square_root", "answer"])
def test_packed_rows_weigh_as_rows_of_their_own(average: str) -> None:
    hidden, labels, head = example()
    labels[:, 0] = -100  # nothing before a sample could judge its first token
    kept = [5, 3, 7]
    alone = labels.clone()
    for row, length in enumerate(kept):
        alone[row, length:] = -100
    objective = NextToken(average=average)
    rows = [torch.cat([x[row, :length] for row, length in enumerate(kept)])[None] for x in (hidden, alone)]
    packed = objective(*rows, head, segments=[kept])
    torch.testing.assert_close(packed, objective(hidden, alone, head))
    assert objective.weight(rows[1], segments=[kept]) == pytest.approx(objective.weight(alone))


def test_an_average_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="square_root"):
        NextToken(average="square")
