"""Stage 2: the middleware learns to contrast, match and write (InternVL section 3.3; BLIP-2 section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.middleware.qllama import Stream
from lightning_internvl.model import VLM
from lightning_internvl.objectives import mined_negatives, random_negatives
from lightning_internvl.stages.base import Batch, Stage

NEGATIVES = ("mined", "random")


class GenerativeStage(Stage):
    """ITC + ITM + ITG over the same images, one forward of the middleware for all texts that are known.

    Args:
        negatives: how the wrong captions of ITM are chosen. "random" needs one forward for all three losses; "mined" draws
            captions in proportion to their similarity, so ITM is read after ITC, at the same total cost.
        mined_from_step: before this step "mined" draws at random too. A matching head that starts from nothing learns little
            from captions that are almost right.
        matched_share: share of the pictures that ITM shows with their own caption (InternVL: 0.5; BLIP-2: 1/3).
        backbone_itc: also contrast the pooled tower, as the official retrieval fine-tune does. Where the language model trains,
            this keeps mode "c" aligned with it.
    """

    objectives = ("itc", "itm", "itg")

    def __init__(
        self,
        model: VLM,
        *,
        negatives: str = "mined",
        mined_from_step: int = 0,
        matched_share: float = 0.5,
        backbone_itc: bool = False,
        **stage: Any,
    ) -> None:
        super().__init__(model, **stage)
        if negatives not in NEGATIVES:
            raise ValueError(f"{negatives=} is not known; valid choices: {', '.join(NEGATIVES)}")
        if mined_from_step < 0:
            raise ValueError(f"{mined_from_step=} must be a step, 0 or later")
        if not 0.0 < matched_share < 1.0:
            raise ValueError(f"{matched_share=} must lie between 0 and 1")
        self.negatives, self.mined_from_step = negatives, mined_from_step
        self.matched_share, self.backbone_itc = matched_share, backbone_itc

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """ITC, ITM and ITG of one batch, each a scalar."""
        visual = self.model.encoder(batch["pixel_values"])[0]
        itc, itg = Stream("itc", batch["itc_ids"], batch["itc_mask"]), Stream("itg", batch["itg_ids"], batch["itg_mask"])
        if self.negatives == "random" or self.global_step < self.mined_from_step:
            itm, match = match_texts(batch, random_negatives(len(visual), visual.device), self.matched_share)
            reads = self.model.middleware.read(visual, [itm, itc, itg])
        else:
            reads = self.model.middleware.read(visual, [itc, itg])
            negatives = mined_negatives(similarity(self.model, *itc_features(self.model, reads[0], itc)))
            itm, match = match_texts(batch, negatives, self.matched_share)
            reads = self.model.middleware.read(visual, [itm]) + reads
        losses = three_losses(self.model, reads, itc, match, batch["itg_labels"])
        if self.backbone_itc:
            text = self.model.middleware.project_text(reads[1][1], itc.mask)
            losses["itc"] = losses["itc"] + self.model.objectives["itc"](self.model.middleware.clip_projector(visual), text)
        return losses


def match_texts(batch: Batch, negatives_B: Tensor, matched_share: float = 0.5) -> tuple[Stream, Tensor]:
    """The ITM texts: the last rows of the batch, `matched_share` of them, read their own caption (label 1), the others a wrong
    one (label 0)."""
    rows = torch.arange(len(negatives_B), device=negatives_B.device)
    matched = rows >= len(rows) - int(len(rows) * matched_share)
    chosen = torch.where(matched, rows, negatives_B)
    return Stream("itm", batch["itm_ids"][chosen], batch["itm_mask"][chosen]), matched.long()


def itc_features(model: VLM, read: tuple[Tensor, Tensor], itc: Stream) -> tuple[Tensor, Tensor]:
    """Image and text features (B, E) of the ITC stream."""
    queries, text = read
    return model.middleware.clip_projector2(queries), model.middleware.project_text(text, itc.mask)


@torch.no_grad()
def similarity(model: VLM, image_BE: Tensor, text_BE: Tensor) -> Tensor:
    """Scaled cosine similarities (B, B)."""
    return model.objectives["itc"].scale * F.normalize(image_BE, dim=-1) @ F.normalize(text_BE, dim=-1).T


def three_losses(
    model: VLM,
    reads: list[tuple[Tensor, Tensor]],
    itc: Stream,
    match_B: Tensor,
    itg_labels_BL: Tensor,
    itc_ignored_B: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of the three streams, in the order ITM, ITC, ITG of the official forward.

    The official code leaves out pairs without a caption: such rows have -100 in `match_B` and True in `itc_ignored_B`.
    """
    read_itm, read_itc, read_itg = reads
    head = model.middleware.qllama.lm_head
    return {
        "itm": model.objectives["itm"](read_itm[0], match_B),
        "itc": model.objectives["itc"](*itc_features(model, read_itc, itc), itc_ignored_B),
        "itg": model.objectives["itg"](read_itg[1], itg_labels_BL, head),
    }
