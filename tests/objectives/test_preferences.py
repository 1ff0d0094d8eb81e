"""Losses of pairs of answers equal their papers' formulas and, with their gradients, the trainers of trl."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_internvl.objectives import DPO, KTO, MPO, ORPO, NextToken, Pairs, Preference, SimPO
from lightning_internvl.objectives.next_token import sample_numbers

P, L, V = 3, 9, 11
# Loss and norm of its gradient by the logits, of trl 1.16.0 with beta 0.1 (SimPO 2.0, gamma 1.0) on `logits`: `DPOTrainer` with
# loss_type sigmoid, and with sigmoid, bco_pair and sft at 0.8, 0.2 and 1; `KTOTrainer` with the same KL divergence;
# `ORPOTrainer.odds_ratio_loss` beside the loss of the chosen answers alone; `CPOTrainer` with loss_type simpo.
OF_TRL: dict[type[Preference], tuple[float, float]] = {
    DPO: (0.9008209, 0.1172238), MPO: (4.6378374, 0.3396133), KTO: (0.5437621, 0.0231550), ORPO: (3.7085094, 0.2599354),
    SimPO: (2.4725251, 0.6526634),
}  # fmt: skip


def logits(phase: float, scale: float) -> Tensor:
    """Of three chosen answers and three rejected ones, in rows: (6, L, V)."""
    n = torch.arange(2 * P * L * V, dtype=torch.float32)
    return (scale * torch.sin(n * 0.37 + phase) + 0.5 * torch.cos(n * n * 0.011 + phase)).view(2 * P, L, V)


def labels() -> Tensor:
    """The last 4, 6 and 8 tokens of the chosen rows, the last 5, 3 and 7 of the rejected ones."""
    ids, lengths = (torch.arange(2 * P * L) * 7 % V).view(2 * P, L), torch.tensor([4, 6, 8, 5, 3, 7])
    return ids.masked_fill(torch.arange(L) < (L - lengths)[:, None], -100)


def pairs_of(policy: Tensor, chunk: int | None = 5) -> Pairs:
    judge, head = NextToken(chunk=chunk), torch.nn.Identity()
    (sums, tokens), (reference, _) = (judge.log_probabilities(x, labels(), head) for x in (policy, logits(1.3, 1.5)))
    return Pairs(*sums.chunk(2), *tokens.chunk(2), *reference.chunk(2))


def loss_of(objective: Preference, pairs: Pairs) -> Tensor:
    tokens = pairs.chosen_tokens.sum()
    means = {name: x.sum() / tokens if name == "generation" else x.mean() for name, x in objective(pairs).items()}
    return sum((objective.weights[name] * x for name, x in means.items()), torch.zeros(()))


@pytest.mark.parametrize("kind", OF_TRL)
def test_loss_and_gradient_are_those_of_trl(kind: Callable[[], Preference]) -> None:
    policy = logits(0.0, 2.0).requires_grad_()
    loss = loss_of(kind(), pairs_of(policy))
    loss.backward()
    assert policy.grad is not None
    assert (loss.item(), float(policy.grad.norm())) == pytest.approx(OF_TRL[kind], rel=1e-6)


def test_log_probabilities_are_sums_over_the_labelled_tokens_of_each_row_whatever_the_chunk() -> None:
    policy = logits(0.0, 2.0).requires_grad_()
    targets = labels()[:, 1:]
    tokens = policy[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    wanted = tokens.masked_fill(targets < 0, 0.0).sum(1)
    (of_all,) = torch.autograd.grad(wanted.square().sum(), policy)
    for chunk in (None, 1, 5):
        sums, number = NextToken(chunk=chunk).log_probabilities(policy, labels(), torch.nn.Identity())
        torch.testing.assert_close(sums, wanted)
        assert number.tolist() == [4, 6, 8, 5, 3, 7]
        (gradient,) = torch.autograd.grad(sums.square().sum(), policy)
        torch.testing.assert_close(gradient, of_all)


def test_packed_rows_give_the_log_probabilities_of_their_samples() -> None:
    policy = logits(0.0, 2.0)
    alone, _ = NextToken().log_probabilities(policy, labels(), torch.nn.Identity())
    firsts = labels().index_fill(1, torch.tensor([0]), -100)  # in a packed row no state stands before them
    packed, tokens = NextToken().log_probabilities(
        policy.reshape(2, 3 * L, V), firsts.view(2, 3 * L), torch.nn.Identity(), segments=[[L, L, L], [L, L, L]]
    )
    torch.testing.assert_close(packed, alone)
    assert tokens.tolist() == [4, 6, 8, 5, 3, 7]
    numbers, count = sample_numbers(torch.zeros(2, 5), [[2, 2], [3]])
    assert (numbers.tolist(), count) == ([[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]], 3)


def pair(chosen: float, rejected: float, reference_chosen: float = -3.0, reference_rejected: float = -2.0) -> Pairs:
    numbers = (chosen, rejected, 2.0, 4.0, reference_chosen, reference_rejected)
    return Pairs(*(torch.tensor([number]) for number in numbers))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_terms_are_the_formulas_of_their_papers() -> None:
    one = pair(-2.0, -5.0)  # log-ratios of 1 and -3, means of -1 and -1.25
    assert DPO(beta=0.5)(one)["preference"].item() == pytest.approx(-math.log(sigmoid(2.0)))
    smooth = DPO(beta=0.5, label_smoothing=0.1)(one)["preference"].item()
    assert smooth == pytest.approx(-0.9 * math.log(sigmoid(2.0)) - 0.1 * math.log(sigmoid(-2.0)))
    mixed = MPO(beta=0.5)(one)
    assert mixed["quality"].item() == pytest.approx(-math.log(sigmoid(0.5)) - math.log(sigmoid(1.5)))
    assert (mixed["generation"].item(), MPO().weights) == (2.0, {"preference": 0.8, "quality": 0.2, "generation": 1.0})
    # the mean of the log-ratios is below 0, so that the reference point is 0
    assert KTO(beta=0.5)(one)["preference"].item() == pytest.approx((1 - sigmoid(0.5) + 1 - sigmoid(1.5)) / 2)
    moved = KTO(beta=0.5, chosen=2.0)(pair(2.0, -1.0))["preference"].item()  # log-ratios of 5 and 1, the point is 3
    assert moved == pytest.approx((2 * (1 - sigmoid(1.0)) + 1 - sigmoid(1.0)) / 2)
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (-1.0, -1.25)]
    assert ORPO()(one)["preference"].item() == pytest.approx(-math.log(sigmoid(math.log(odds[0] / odds[1]))), rel=1e-6)
    assert SimPO(beta=2.0, gamma=0.3)(one)["preference"].item() == pytest.approx(-math.log(sigmoid(2 * 0.25 - 0.3)))


def test_certain_answers_have_finite_odds() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    certain = pair(0.0, -5.0)._replace(chosen=chosen)
    loss = ORPO()(certain)["preference"].sum()
    loss.backward()
    assert loss.isfinite()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "settings"), [(DPO, {"beta": 0}), (KTO, {"beta": -1.0}), (DPO, {"label_smoothing": 0.5})])
def test_settings_that_say_nothing_are_refused(kind: Callable[..., Preference], settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)


def test_what_needs_a_reference_says_so() -> None:
    alone = pair(-2.0, -5.0)._replace(reference_chosen=None, reference_rejected=None)
    for objective in (ORPO(), SimPO()):
        assert objective(alone)
    with pytest.raises(ValueError, match="reference"):
        DPO()(alone)
