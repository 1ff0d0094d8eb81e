"""Stage 1: tower and language model learn one space (InternVL section 3.3, vision-language
contrastive training)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_internvl.layers.chunking import check_chunk, checkpointed_chunks, number_of_chunks
from lightning_internvl.objectives.similarity import pair_names
from lightning_internvl.stages.base import Batch, Stage


class ContrastiveStage(Stage):
    """Symmetric ITC between pooled images and the last token of each caption.

    Args:
        keep_tokens: share of patch tokens that the encoder keeps while training (1.0: all; 0.5:
            FLIP-like, twice as fast).
        full_from_step: from this step on all tokens are kept, the end phase of the published
            recipe.
        cached_chunk: pairs that are embedded at a time, so that a batch may be larger than what
            memory holds (GradCache, Gao et al. 2021): embeddings are computed without a graph, the
            loss compares those of the whole batch, and each chunk is then computed again with a
            graph and gets its gradient. The same gradients at the memory of one chunk and the cost
            of a second forward pass (of all chunks but the last). None: all pairs at once.
    """

    objectives = ("itc",)

    def __init__(
        self,
        model: Any,
        *,
        keep_tokens: float = 1.0,
        full_from_step: int | None = None,
        cached_chunk: int | None = None,
        **stage: Any,
    ) -> None:
        super().__init__(model, **stage)
        if not 0.0 < keep_tokens <= 1.0:
            raise ValueError(f"{keep_tokens=} must lie above 0 and at most at 1")
        check_chunk("cached_chunk", cached_chunk)
        self.keep_tokens, self.full_from_step, self.cached_chunk = keep_tokens, full_from_step, cached_chunk

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """ITC of one batch, a scalar."""
        pairs = batch["pixel_values"], batch["itc_ids"], batch["itc_mask"]
        pieces = number_of_chunks(len(batch["itc_ids"]), self.cached_chunk)
        if pieces == 1:
            image, text = self._embed_pairs(*pairs)
        else:
            found = checkpointed_chunks(self._embed_pairs, pieces, *pairs, draws=True, keep_last=True)
            image, text = map(torch.cat, zip(*found, strict=True))
        contrast = self.model.objectives["itc"]
        return {"itc": contrast(image, text, **pair_names(contrast, batch))}

    def _embed_pairs(self, pixels: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        full = self.full_from_step is not None and self.global_step >= self.full_from_step
        feats = self.model.encoder(pixels, keep=1.0 if full else self.keep_tokens)
        middleware = self.model.middleware
        return middleware.embed_image(feats, "c"), middleware.embed_text(ids_BL, mask_BL)
