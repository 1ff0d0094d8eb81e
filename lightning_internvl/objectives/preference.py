"""Objectives of pairs of answers, one preferred to the other: on the log-probability of each whole
answer under the model that learns and, where they need one, under a frozen reference.

All give a loss for each pair by the names of their terms, whose weights are in `weights`; a stage
takes means. Letters: P pairs.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.distributed.collectives import gather
from lightning_internvl.messages import check_number

PREFERENCE, QUALITY, GENERATION = "preference", "quality", "generation"  # the terms
MOST = -1e-7  # of a mean log-probability, so that the odds of a certain answer are finite


class Pairs(NamedTuple):
    """Sums of log-probabilities over the tokens of each answer, and how many these are, (P,) each;
    those of the reference are None where there is none."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference) of the chosen and the rejected answers, (P,) each."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this objective compares with a reference: give its log-probabilities")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The mean log-probability of a token of the chosen and the rejected answers, (P,) each."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


class Preference(nn.Module):
    """What the objectives share.

    Attributes:
        weights: of the terms.
        needs_reference: whether log-probabilities under a reference are needed.
        alone: whether each pair is judged for itself.
    """

    needs_reference: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    weights: dict[str, float]
    beta: float

    def forward(self, pairs: Pairs) -> dict[str, Tensor]:
        """The losses (P,) by term. Of `GENERATION` they are sums over tokens, and their mean is one
        over the tokens of the chosen answers."""
        raise TypeError(f"{type(self).__name__} must say what it makes of pairs")

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What it implies that the chosen and the rejected answers are worth, (P,) each."""
        chosen, rejected = pairs.ratios if self.needs_reference else pairs.means
        return self.beta * chosen, self.beta * rejected


class DPO(Preference):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7): the chosen answer gains on the
    rejected one, compared with the reference.

    Args:
        beta: how dear it is to leave the reference.
        label_smoothing: the share of pairs that may be the wrong way round (Mitchell 2023).
    """

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_number("beta", beta, above=0)
        if not 0.0 <= label_smoothing < 0.5:
            raise ValueError(f"{label_smoothing=} must lie from 0 on and below 0.5")
        self.beta, self.label_smoothing = beta, label_smoothing
        self.weights = {PREFERENCE: 1.0}

    def forward(self, pairs: Pairs) -> dict[str, Tensor]:
        """The losses (P,) by term."""
        chosen, rejected = pairs.ratios
        return {PREFERENCE: _of_margin(self.beta * (chosen - rejected), self.label_smoothing)}


class MPO(DPO):
    """Mixed preference optimisation (Wang et al. 2024, equations 1 to 4; InternVL 2.5-MPO, 3 and 3.5): which
    answer is better (DPO), whether each is good (BCO, Jung et al. 2024), and how to write the chosen one. The
    shift of BCO's rewards, a running mean in the paper, is 0, as in trl: each pair is judged alone.

    Args:
        preference, quality, generation: weights of the terms; the published ones by default.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        preference: float = 0.8,
        quality: float = 0.2,
        generation: float = 1.0,
    ) -> None:
        super().__init__(beta=beta, label_smoothing=label_smoothing)
        self.weights = {PREFERENCE: preference, QUALITY: quality, GENERATION: generation}

    def forward(self, pairs: Pairs) -> dict[str, Tensor]:
        """The losses (P,) by term."""
        chosen, rejected = self.rewards(pairs)
        quality = -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
        return {**super().forward(pairs), QUALITY: quality, GENERATION: -pairs.chosen}


class KTO(Preference):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equation 7): each answer by itself is worth more
    or less than the reference point, which is how far the model has moved from the reference.

    That distance is estimated, without gradient, from the answers of the batch of all processes, so
    that no mismatched answers are computed for it; it is never below 0.

    Args:
        beta: how dear it is to leave the reference.
        chosen, rejected: weights of the answers.
    """

    alone = False

    def __init__(self, *, beta: float = 0.1, chosen: float = 1.0, rejected: float = 1.0) -> None:
        super().__init__()
        check_number("beta", beta, above=0)
        self.beta, self.chosen, self.rejected = beta, chosen, rejected
        self.weights = {PREFERENCE: 1.0}

    def forward(self, pairs: Pairs) -> dict[str, Tensor]:
        """The losses (P,) by term."""
        chosen, rejected = pairs.ratios
        ratios = torch.cat([chosen, rejected]).detach()
        total, count = gather(torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])[None]).sum(dim=0)
        point = (total / count).clamp(min=0)
        gain = self.chosen * (1 - torch.sigmoid(self.beta * (chosen - point)))
        loss = self.rejected * (1 - torch.sigmoid(self.beta * (point - rejected)))
        return {PREFERENCE: (gain + loss) / 2}


class ORPO(Preference):
    """Odds ratio preference optimisation (Hong et al. 2024, equations 6 and 7): the chosen answer is written, at
    better odds than the rejected one; without a reference.

    Args:
        beta: weight of the odds (lambda in the paper).
    """

    needs_reference = False

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        check_number("beta", beta, above=0)
        self.beta = beta
        self.weights = {PREFERENCE: beta, GENERATION: 1.0}

    def forward(self, pairs: Pairs) -> dict[str, Tensor]:
        """The losses (P,) by term."""
        chosen, rejected = (_log_odds(mean.clamp(max=MOST)) for mean in pairs.means)
        return {PREFERENCE: _of_margin(chosen - rejected), GENERATION: -pairs.chosen}


class SimPO(Preference):
    """Simple preference optimisation (Meng et al. 2024, equation 6): by the mean log-probability of a token, the
    chosen answer leads by a margin; without a reference.

    Args:
        beta: scale of the rewards.
        gamma: the margin of the rewards.
    """

    needs_reference = False

    def __init__(self, *, beta: float = 2.0, gamma: float = 1.0) -> None:
        super().__init__()
        check_number("beta", beta, above=0)
        self.beta, self.gamma = beta, gamma
        self.weights = {PREFERENCE: 1.0}

    def forward(self, pairs: Pairs) -> dict[str, Tensor]:
        """The losses (P,) by term."""
        chosen, rejected = self.rewards(pairs)
        return {PREFERENCE: _of_margin(chosen - rejected - self.gamma)}


def _of_margin(margin_P: Tensor, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of the chosen answer being the better one."""
    loss_P = -(1 - smoothing) * F.logsigmoid(margin_P)
    return loss_P - smoothing * F.logsigmoid(-margin_P) if smoothing else loss_P


def _log_odds(log_P: Tensor) -> Tensor:
    """log(p / (1 - p)) for log(p) below 0."""
    return log_P - torch.log(-torch.expm1(log_P))
