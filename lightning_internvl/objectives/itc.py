"""Image-text contrast: symmetric cross-entropy of cosine similarities with a learnable scale (CLIP; InternVL stages 1 and 2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.distributed import gather_with_grad, global_mean, rank

IGNORED = -100


class ITC(nn.Module):
    """Each rank compares its own rows with the columns of all ranks, gathered with gradient.

    Args:
        init_scale: start of the scale (the inverse of the temperature).
        max_scale: the scale is held below this.
        label_smoothing: share of the target spread over all columns.
    """

    def __init__(self, *, init_scale: float = 1 / 0.07, max_scale: float = 100.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        # Stored as a logarithm, and with one dimension because sharding refuses scalars.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(init_scale)]))
        self.max_log_scale = math.log(max_scale)
        self.label_smoothing = label_smoothing

    @property
    def scale(self) -> Tensor:
        """The factor on cosine similarities, shape (1,)."""
        return self.logit_scale.exp()

    def forward(self, image_BE: Tensor, text_BE: Tensor, ignored_B: Tensor | None = None) -> Tensor:
        """Mean over rows of both directions for matching rows (B, E), which need not be normalised.

        Args:
            ignored_B: True for pairs that others are compared with but that are not judged themselves (empty captions).
        """
        if self.training:
            # Held in place, as CLIP does: a clamp inside the graph has no gradient above the limit and traps the scale there.
            self.logit_scale.data.clamp_(max=self.max_log_scale)
        image, text = F.normalize(image_BE, dim=-1), F.normalize(text_BE, dim=-1)
        labels = torch.arange(len(image), device=image.device) + rank() * len(image)
        to_text = self.scale * image @ gather_with_grad(text).T
        to_image = self.scale * text @ gather_with_grad(image).T
        if ignored_B is None:
            losses = [F.cross_entropy(x.float(), labels, label_smoothing=self.label_smoothing) for x in (to_text, to_image)]
            return (losses[0] + losses[1]) / 2
        labels = labels.masked_fill(ignored_B, IGNORED)
        sums = [
            F.cross_entropy(x.float(), labels, ignore_index=IGNORED, label_smoothing=self.label_smoothing, reduction="sum")
            for x in (to_text, to_image)
        ]
        return global_mean((sums[0] + sums[1]) / 2, (~ignored_B).sum())
