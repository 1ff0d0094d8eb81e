"""Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, section 4.1), as it is done today:
the upper limit of the ratio lies higher (DAPO, Yu et al. 2025, section 3.1), a loss is a mean over the
tokens of all answers (DAPO, section 3.3), and there is no reference model (DAPO, section 2.3).

Letters: Q questions, G answers to each, T tokens of answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_internvl.messages import check_number

LEAST_STD = 1e-4  # is added to the deviation of a group, so that rewards which hardly differ do not explode


class GRPO(nn.Module):
    """The clipped surrogate of answers that are better or worse than others to the same question.

    Args:
        epsilon_low: a token of a worse answer teaches nothing more once its probability has fallen
            below 1 - epsilon_low of what it was when the answer was drawn.
        epsilon_high: a token of a better answer nothing more once it has risen above
            1 + epsilon_high.
        divide_by_std: whether advantages are divided by the deviation of their group; without, a
            question that is nearly always or nearly never answered weighs no more than others (Dr.
            GRPO, Liu et al. 2025, section 3.2).
    """

    alone = True  # each question is judged for itself

    def __init__(self, *, epsilon_low: float = 0.2, epsilon_high: float = 0.28, divide_by_std: bool = True) -> None:
        super().__init__()
        check_number("epsilon_low", epsilon_low, above=0)
        check_number("epsilon_high", epsilon_high, above=0)
        self.epsilon_low, self.epsilon_high, self.divide_by_std = epsilon_low, epsilon_high, divide_by_std

    def advantages(self, rewards_QG: Tensor) -> Tensor:
        """How much better each answer is than the others of its group, (Q, G); 0 in a group whose
        rewards are all equal, which teaches nothing."""
        found = rewards_QG - rewards_QG.mean(dim=1, keepdim=True)
        if self.divide_by_std:
            found = found / (rewards_QG.std(dim=1, keepdim=True) + LEAST_STD)
        return found.masked_fill(equal_groups(rewards_QG)[:, None], 0.0)

    def forward(self, log_probs_T: Tensor, sampled_T: Tensor, advantages_T: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each token (T,), and whether it was clipped (T,) bool.

        Args:
            log_probs_T: of the tokens under the model that learns.
            sampled_T: their log-probabilities when the answers were drawn, without gradient.
            advantages_T: of the answer that each token belongs to.
        """
        ratios_T = (log_probs_T - sampled_T).exp()
        limited_T = ratios_T.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss_T = -torch.min(ratios_T * advantages_T, limited_T * advantages_T)
        too_low_T = (ratios_T < 1 - self.epsilon_low) & (advantages_T < 0)
        too_high_T = (ratios_T > 1 + self.epsilon_high) & (advantages_T > 0)
        return loss_T, too_low_T | too_high_T


def equal_groups(rewards_QG: Tensor) -> Tensor:
    """Which groups have one reward for all answers: (Q,) bool."""
    return (rewards_QG == rewards_QG[:, :1]).all(dim=1)
