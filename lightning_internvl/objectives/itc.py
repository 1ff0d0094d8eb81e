"""Image-text contrast: symmetric cross-entropy of cosine similarities with a learnable scale (CLIP; InternVL stages 1 and 2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.distributed import gather, gather_with_grad, global_mean, rank, world_size

GATHERS = ("exact", "global", "detached")


class ITC(nn.Module):
    """Each rank compares its own rows with the columns of all ranks, gathered with gradient.

    Args:
        init_scale: start of the scale (the inverse of the temperature).
        max_scale: the scale is held below this.
        label_smoothing: share of the target spread over all columns.
        gather: what a rank computes where there are several. "exact" as above, which is exact for any number of processes;
            "global": the loss of all rows, on every rank, with the same gradients at a higher cost (open_clip with
            `gather_with_grad`); "detached": that loss, but without gradient through the rows of other ranks, so that averaged
            gradients of the encoders are too small by the number of processes (open_clip by default).
    """

    def __init__(
        self, *, init_scale: float = 1 / 0.07, max_scale: float = 100.0, label_smoothing: float = 0.0, gather: str = "exact"
    ) -> None:
        super().__init__()
        if gather not in GATHERS:
            raise ValueError(f"{gather=} is not known; valid choices: {', '.join(GATHERS)}")
        # Stored as a logarithm, and with one dimension because sharding refuses scalars.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(init_scale)]))
        self.max_log_scale = math.log(max_scale)
        self.label_smoothing, self.gather = label_smoothing, gather

    @property
    def scale(self) -> Tensor:
        """The factor on cosine similarities, shape (1,)."""
        return self.logit_scale.exp()

    def logits(self, image_BE: Tensor, text_CE: Tensor) -> Tensor:
        """Normalised rows to scaled similarities (B, C)."""
        return self.scale * image_BE @ text_CE.T

    def forward(
        self, image_BE: Tensor, text_BE: Tensor, ignored_B: Tensor | None = None, image_ids_B: Tensor | None = None
    ) -> Tensor:
        """Mean over rows of both directions for matching rows (B, E), which need not be normalised.

        Args:
            ignored_B: True for pairs that others are compared with but that are not judged themselves (empty captions).
            image_ids_B: whole numbers that name the pictures. A row then matches every row of the same picture, on all ranks, to
                equal shares, in both directions (InternVL retrieval fine-tune); without them it matches its own row alone.
        """
        if self.training:
            # Held in place, as CLIP does: a clamp inside the graph has no gradient above the limit and traps the scale there.
            self.logit_scale.data.clamp_(max=self.max_log_scale)
        image, text = F.normalize(image_BE, dim=-1), F.normalize(text_BE, dim=-1)
        all_text, all_image = self._gathered(text), self._gathered(image)
        first, ids = rank() * len(image), image_ids_B
        if self.gather != "exact":  # every rank judges all rows
            image, text, first = all_image, all_text, 0
            ids, ignored_B = (None if x is None else gather(x) for x in (image_ids_B, ignored_B))
        to_text, to_image = self.logits(image, all_text), self.logits(text, all_image)
        if ids is None:
            targets = torch.arange(len(image), device=image.device) + first
        else:
            same = (ids[:, None] == gather(image_ids_B)).float()
            targets = same / same.sum(dim=1, keepdim=True)
        options = {"label_smoothing": self.label_smoothing, "reduction": "mean" if ignored_B is None else "none"}
        losses = [F.cross_entropy(x.float(), targets, **options) for x in (to_text, to_image)]
        loss = (losses[0] + losses[1]) / 2
        return loss if ignored_B is None else global_mean(loss.masked_fill(ignored_B, 0.0).sum(), (~ignored_B).sum())

    def _gathered(self, x_BE: Tensor) -> Tensor:
        """Rows of all ranks, (W * B, E)."""
        if self.gather != "detached" or world_size() == 1:
            return gather_with_grad(x_BE)
        blocks = list(gather(x_BE.detach()).split(len(x_BE)))
        blocks[rank()] = x_BE
        return torch.cat(blocks)
