"""Stage 1: tower and language model learn one space (InternVL section 3.3, vision-language contrastive training)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_internvl.stages.base import Batch, Stage


class ContrastiveStage(Stage):
    """Symmetric ITC between pooled images and the last token of each caption.

    Args:
        keep_tokens: share of patch tokens that the encoder keeps while training (1.0: all; 0.5: FLIP-like, twice as fast).
        full_from_step: from this step on all tokens are kept, the end phase of the published recipe.
    """

    objectives = ("itc",)

    def __init__(self, model: Any, *, keep_tokens: float = 1.0, full_from_step: int | None = None, **stage: Any) -> None:
        super().__init__(model, **stage)
        if not 0.0 < keep_tokens <= 1.0:
            raise ValueError(f"{keep_tokens=} must lie above 0 and at most at 1")
        self.keep_tokens, self.full_from_step = keep_tokens, full_from_step

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """ITC of one batch, a scalar."""
        full = self.full_from_step is not None and self.global_step >= self.full_from_step
        feats = self.model.encoder(batch["pixel_values"], keep=1.0 if full else self.keep_tokens)
        image = self.model.middleware.embed_image(feats, "c")
        text = self.model.middleware.embed_text(batch["itc_ids"], batch["itc_mask"])
        return {"itc": self.model.objectives["itc"](image, text)}
