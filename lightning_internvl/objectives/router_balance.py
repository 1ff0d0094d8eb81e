"""The loss that spreads tokens over the experts of a decoder (Fedus et al. 2021, Switch Transformers,
section 2.2; transformers' `load_balancing_loss_func`, which InternVL 3.5's code calls).

Letters: B rows, L tokens of a row, T = B * L, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_internvl.distributed.collectives import gather, global_mean


def router_balance(logits_TE: Sequence[Tensor], mask_BL: Tensor, chosen: int) -> Tensor:
    """E times the sum over experts of the share of tokens that go to one times its mean probability,
    a scalar: `chosen` where all experts are used alike, more where some are used more.

    Shares and means are over the real tokens of all routers and all ranks.

    Args:
        logits_TE: of each router for all tokens, padding too.
        mask_BL: 1 for real tokens.
        chosen: experts that a token goes to.
    """
    real_T = mask_BL.flatten().float()
    used_E, likely_E = (torch.zeros(logits_TE[0].shape[-1], device=real_T.device) for _ in range(2))
    for one_TE in logits_TE:
        probabilities_TE = one_TE.float().softmax(dim=-1)
        places = probabilities_TE.detach().topk(chosen, dim=-1).indices
        used_E = used_E + real_T @ torch.zeros_like(probabilities_TE).scatter_(-1, places, 1.0)
        likely_E = likely_E + real_T @ probabilities_TE
    count = real_T.sum() * len(logits_TE)
    share_E = gather(used_E[None]).sum(dim=0) / gather(count[None]).sum().clamp(min=1)
    return global_mean(len(share_E) * (share_E * likely_E).sum(), count)
