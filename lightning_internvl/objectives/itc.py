"""Image-text contrast: symmetric cross-entropy of cosine similarities with a learnable scale (CLIP;
InternVL stages 1 and 2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.distributed.collectives import gather, gather_with_grad, global_mean, rank, world_size
from lightning_internvl.layers.chunking import check_chunk, checkpointed_chunks, number_of_chunks
from lightning_internvl.messages import check_choice
from lightning_internvl.objectives.similarity import Names, contrast, gathered, products

GATHERS = ("exact", "global", "detached")


class ITC(nn.Module):
    """Each rank compares its own rows with the columns of all ranks, gathered with gradient.

    Args:
        init_scale: start of the scale (the inverse of the temperature).
        max_scale: the scale is held below this.
        label_smoothing: share of the target spread over all columns.
        gather: what a rank computes where there are several. "exact" as above, which is exact for
            any number of processes; "global": the loss of all rows, on every rank, with the same
            gradients at a higher cost (open_clip with `gather_with_grad`); "detached": that loss,
            but without gradient through the rows of other ranks, so that averaged gradients of the
            encoders are too small by the number of processes (open_clip by default).
        chunk: rows that are compared at a time, so that at most `chunk` x columns similarities are
            held, twice while gradients are computed; each chunk is computed a second time for its
            gradient. None: all rows.
    """

    compares: str | None = "pictures"  # with captions (see `lightning_internvl.model.compatibility`)

    def __init__(
        self,
        *,
        init_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
        label_smoothing: float = 0.0,
        gather: str = "exact",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_chunk("chunk", chunk)
        check_choice("gather", gather, GATHERS)
        # Stored as a logarithm, and with one dimension because sharding refuses scalars.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(init_scale)]))
        self.max_log_scale = math.log(max_scale)
        self.label_smoothing, self.gather, self.chunk = label_smoothing, gather, chunk

    @property
    def scale(self) -> Tensor:
        """The factor on cosine similarities, shape (1,)."""
        return self.logit_scale.exp()

    def logits(self, image_BE: Tensor, text_CE: Tensor) -> Tensor:
        """Normalised rows to scaled similarities (B, C)."""
        return products(self.scale.float() * image_BE, text_CE)

    def forward(
        self,
        image_BE: Tensor,
        text_BE: Tensor,
        ignored_B: Tensor | None = None,
        image_ids_B: Tensor | None = None,
        pair_ids_B: Tensor | None = None,
    ) -> Tensor:
        """Mean over rows of both directions for matching rows (B, E), which need not be normalised.

        Args:
            ignored_B: True for pairs that others are compared with but that are not judged
                themselves (empty captions).
            image_ids_B: whole numbers that name the pictures. A row then matches every row of the
                same picture, on all ranks, to equal shares, in both directions (InternVL retrieval
                fine-tune); without them it matches its own row alone.
            pair_ids_B: whole numbers that name the pairs; a pair is not compared with itself where
                it comes twice.
        """
        if self.training:
            # Held in place, as CLIP does: a clamp inside the graph has no gradient above the limit
            # and traps the scale there.
            self.logit_scale.data.clamp_(max=self.max_log_scale)
        image, text = F.normalize(image_BE, dim=-1), F.normalize(text_BE, dim=-1)
        all_text, all_image = self._gathered(text), self._gathered(image)
        first = rank() * len(image)
        if self.gather != "exact":  # every rank judges all rows
            image, text, first = all_image, all_text, 0
            ignored_B = None if ignored_B is None else gather(ignored_B)
        own_B = torch.arange(len(image), device=image.device) + first
        ids_C = (gathered(image_ids_B), gathered(pair_ids_B))
        each = ignored_B is not None
        sides = ((image, all_text), (text, all_image))
        losses = [self._losses(rows, columns, own_B, ids_C, each) for rows, columns in sides]
        loss = (losses[0] + losses[1]) / 2
        if ignored_B is None:
            return loss
        return global_mean(loss.masked_fill(ignored_B, 0.0).sum(), (~ignored_B).sum())

    def _losses(self, rows_BE: Tensor, columns_CE: Tensor, own_B: Tensor, ids_C: Names, each: bool) -> Tensor:
        """Of each row, (B,), or their mean."""

        def judge(rows: Tensor, own: Tensor, reduction: str = "none") -> Tensor:
            return contrast(self.logits(rows, columns_CE), own, *ids_C, self.label_smoothing, reduction)

        pieces = number_of_chunks(len(rows_BE), self.chunk)
        if pieces == 1:
            return judge(rows_BE, own_B, "none" if each else "mean")
        losses = torch.cat(checkpointed_chunks(judge, pieces, rows_BE, own_B))
        return losses if each else losses.mean()

    def _gathered(self, x_BE: Tensor) -> Tensor:
        """Rows of all ranks, (W * B, E)."""
        if self.gather != "detached" or world_size() == 1:
            return gather_with_grad(x_BE)
        blocks = list(gather(x_BE.detach()).split(len(x_BE)))
        blocks[rank()] = x_BE
        return torch.cat(blocks)


class WordITC(ITC):
    """The contrast of visual tokens with a decoder's words (see
    `lightning_internvl.stages.word_alignment`), whatever the middleware embeds."""

    compares = None
