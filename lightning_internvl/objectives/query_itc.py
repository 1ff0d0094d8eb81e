"""Image-text contrast where a picture has an embedding a query and its best one counts (Li et al.
2023, BLIP-2 section 3.1).

Letters: B rows of this rank, W ranks, Q queries, E width, C columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.distributed.collectives import gather, gather_with_grad, global_mean, rank
from lightning_internvl.layers.chunking import check_chunk, checkpointed_chunks, number_of_chunks
from lightning_internvl.objectives.similarity import Names, contrast, gathered, late_similarities, products

Scores = Callable[[Tensor, Tensor], Tensor]  # rows and columns to scaled similarities (B, C)


class QueryITC(nn.Module):
    """Symmetric cross-entropy of the best query's cosine over a learnable temperature (LAVIS
    `blip2_qformer.py`).

    Args:
        init_temp: start of the temperature.
        min_temp: it is held above this while training (LAVIS: no bound).
        label_smoothing: share of the target spread over all columns.
        gather_gradient: whether what rows are compared with gets gradients too, also that of other
            ranks. LAVIS does without, which gives the same losses and, even on one process, other
            gradients.
        learnable: False keeps the temperature as it is, and out of checkpoints.
        chunk: rows that are compared at a time, so that at most `chunk` x queries x columns
            similarities are held, twice while gradients are computed; each chunk is computed a
            second time for its gradient. None: all rows.
    """

    compares = "queries"  # with captions (see `lightning_internvl.model.compatibility`)

    def __init__(
        self,
        *,
        init_temp: float = 0.07,
        min_temp: float = 0.01,
        label_smoothing: float = 0.0,
        gather_gradient: bool = True,
        learnable: bool = True,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_chunk("chunk", chunk)
        if init_temp <= 0 or not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"{init_temp=} must lie above 0, and {label_smoothing=} from 0 on and below 1")
        temp = torch.tensor([float(init_temp)])
        self.min_temp, self.label_smoothing = min_temp, label_smoothing
        self.gather_gradient = gather_gradient
        self.chunk = chunk
        if learnable:
            self.temp = nn.Parameter(temp)
        else:
            self.register_buffer("temp", temp, persistent=False)

    @property
    def scale(self) -> Tensor:
        """The factor on cosine similarities, shape (1,)."""
        return 1 / self.temp

    def logits(self, image: Tensor, text_CE: Tensor) -> Tensor:
        """Normalised (B, Q, E) and (C, E) to scaled similarities (B, C)."""
        return similarities(image, text_CE) / self.temp

    def forward(
        self,
        image_BQE: Tensor,
        text_BE: Tensor,
        ignored_B: Tensor | None = None,
        image_ids_B: Tensor | None = None,
        pair_ids_B: Tensor | None = None,
    ) -> Tensor:
        """Mean over rows of both directions for matching rows, which need not be normalised.

        Args:
            ignored_B: True for pairs that others are compared with but that are not judged
                themselves.
            image_ids_B: whole numbers that name the pictures. A row then matches every row of the
                same picture, on all ranks, to equal shares (COCO retrieval); without them it
                matches its own row alone.
            pair_ids_B: whole numbers that name the pairs; a pair is not compared with itself where
                it comes twice.
        """
        if self.training:
            self.temp.data.clamp_(min=self.min_temp)
        image, text = F.normalize(image_BQE, dim=-1), F.normalize(text_BE, dim=-1)
        own_B = torch.arange(len(image), device=image.device) + rank() * len(image)
        ids_C = (gathered(image_ids_B), gathered(pair_ids_B))
        each = ignored_B is not None
        losses = [
            self._losses(self.logits, image, self._gathered(text), own_B, ids_C, each),
            self._losses(lambda rows, columns: self.logits(columns, rows).T, text, self._gathered(image), own_B, ids_C, each),
        ]
        loss = (losses[0] + losses[1]) / 2
        if ignored_B is None:
            return loss
        return global_mean(loss.masked_fill(ignored_B, 0.0).sum(), (~ignored_B).sum())

    def _losses(self, scores: Scores, rows: Tensor, columns: Tensor, own_B: Tensor, ids_C: Names, each: bool) -> Tensor:
        """Of each row, (B,), or their mean."""

        def judge(rows: Tensor, own: Tensor, reduction: str = "none") -> Tensor:
            return contrast(scores(rows, columns), own, *ids_C, self.label_smoothing, reduction)

        pieces = number_of_chunks(len(rows), self.chunk)
        if pieces == 1:
            return judge(rows, own_B, "none" if each else "mean")
        found = torch.cat(checkpointed_chunks(judge, pieces, rows, own_B))
        return found if each else found.mean()

    def _gathered(self, x: Tensor) -> Tensor:
        return gather_with_grad(x) if self.gather_gradient else gather(x.detach())


def similarities(image: Tensor, text: Tensor) -> Tensor:
    """Cosines of normalised embeddings (B, C): of an image (B, E), or its best query (B, Q, E), with
    texts (C, E). Where texts have a vector a token, (C, L, E), they look in images by late
    interaction."""
    if text.ndim == 3:
        return late_similarities(text, image).T
    if image.ndim == 2:
        return products(image, text)
    return products(image, text).max(dim=1).values
