"""Advantages and loss of answers in groups are those of trl's GRPO; limits of the ratio hold on the side they belong to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_internvl.objectives import GRPO, NextToken
from lightning_internvl.objectives.grpo import equal_groups

R, L, V = 6, 7, 11
# trl 1.16.0: `GRPOTrainer` with loss_type dapo, epsilon 0.2 and 0.28, beta 0, on these tensors by scale_rewards (group, none):
# advantages of the rows, loss, norm of its gradient by the logits, share of clipped tokens.
OF_TRL = {
    True: ((1.1432675, -0.7106798, -0.4325877, 0.0, 0.0, 0.0), 0.090182684, 0.083437636, 0.09375),
    False: ((0.6166667, -0.3833334, -0.2333333, 0.0, 0.0, 0.0), 0.048643608, 0.0450054, 0.09375),
}


def logits(phase: float, scale: float) -> Tensor:
    """Of six answers in rows: (6, L, V)."""
    n = torch.arange(R * L * V, dtype=torch.float32)
    return (scale * torch.sin(n * 0.37 + phase) + 0.5 * torch.cos(n * n * 0.011 + phase)).view(R, L, V)


def labels() -> Tensor:
    """The first 4, 6, 7, 5, 3 and 7 tokens of the rows."""
    ids, lengths = (torch.arange(R * L) * 7 % V).view(R, L), torch.tensor([4, 6, 7, 5, 3, 7])
    return ids.masked_fill(torch.arange(L) >= lengths[:, None], -100)


def rewards() -> Tensor:
    """Of two groups of three answers, of two functions, the second with a weight of 0.2."""
    of_functions = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.25, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    return (of_functions @ torch.tensor([1.0, 0.2])).view(2, 3)


def log_probs(of: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
    return NextToken(chunk=5).token_log_probabilities(of, labels(), torch.nn.Identity(), shifts=False, beside=beside)


@pytest.mark.parametrize("divided", OF_TRL)
def test_advantages_loss_and_gradient_are_those_of_trl(divided: bool) -> None:
    advantages, loss, norm, share = OF_TRL[divided]
    objective = GRPO(divide_by_std=divided)
    found = objective.advantages(rewards()).flatten()
    assert found.tolist() == pytest.approx(advantages, abs=1e-6)
    policy = logits(0.0, 2.0).requires_grad_()
    (sampled,) = log_probs(logits(0.2, 1.9))
    losses, clipped = objective(*_with(log_probs(policy, found[:, None].expand(R, L)), sampled))
    losses.mean().backward()
    assert policy.grad is not None
    assert (losses.mean().item(), float(policy.grad.norm())) == pytest.approx((loss, norm), rel=1e-6)
    assert float(clipped.float().mean()) == pytest.approx(share)


def _with(found: tuple[Tensor, ...], sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return found[0], sampled, found[1]


def test_the_upper_limit_holds_for_better_answers_and_the_lower_for_worse_ones() -> None:
    ratios = torch.tensor([1.27, 1.29, 0.5, 1.5, 0.81, 0.79])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    policy = ratios.log().requires_grad_()
    losses, clipped = GRPO()(policy, torch.zeros(6), advantages)
    losses.sum().backward()
    assert policy.grad is not None
    assert clipped.tolist() == [False, True, False, False, False, True]
    assert policy.grad.ne(0).tolist() == [True, False, True, True, True, False]
    assert losses.tolist() == pytest.approx([-1.27, -1.28, -0.5, 1.5, 0.81, 0.8])


@pytest.mark.parametrize("divided", [True, False])
def test_a_group_of_equal_rewards_teaches_nothing_whatever_they_are(divided: bool) -> None:
    of_one = torch.tensor([[0.1] * 7, [0.1] * 6 + [0.3], [1 / 3] * 7])  # whose mean is rounded
    found = GRPO(divide_by_std=divided).advantages(of_one)
    assert equal_groups(of_one).tolist() == [True, False, True]
    assert found.ne(0).any(dim=1).tolist() == [False, True, False]
    assert found.sum(dim=1).tolist() == pytest.approx([0.0] * 3, abs=1e-5)


@pytest.mark.parametrize("name", ["epsilon_low", "epsilon_high"])
def test_limits_must_leave_room(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        GRPO(**{name: 0.0})
