"""Fine-tuning for retrieval: contrast of the queries and of the tower, and matching (official
`internvl_stage2_retrieval`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.messages import check_choice
from lightning_internvl.middleware.text_streams import TextStream
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import mined_negatives, other_pictures, random_negatives
from lightning_internvl.stages.base import Batch, Stage
from lightning_internvl.stages.generative import check_negatives, itc_features, similarity

MODES = ("c", "g")


class RetrievalStage(Stage):
    """ITC of both image embeddings, and ITM with a right and a wrong caption for every picture.
    Nothing is written here.

    Rows of the batch that show the same picture (equal `image_ids`) match each other's captions
    too.

    Args:
        mode: "g" trains both embeddings and the matching; "c" contrasts the pooled tower alone
            (InternVL-C), without queries.
        negatives: how the wrong captions of ITM are chosen. "random", as in the original, needs one
            forward of the middleware; "mined" draws captions in proportion to their similarity, so
            they are read after the others, at the same total cost.
        mined_from_step: before this step "mined" draws at random too.
    """

    reads_together = True  # pictures and texts, in mode "g" (see `lightning_internvl.config.fit`)

    def __init__(self, model: VLM, *, mode: str = "g", negatives: str = "mined", mined_from_step: int = 0, **stage: Any) -> None:
        check_choice("mode", mode, MODES)
        check_negatives(negatives, mined_from_step)
        self.objectives = ("itc", "itm") if mode == "g" else ("itc",)
        super().__init__(model, **stage)
        self.mode, self.negatives, self.mined_from_step = mode, negatives, mined_from_step

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """ITC by queries, ITC by the tower and ITM of a batch, scalars; in mode "c" the second."""
        visual, ids = self.model.encoder(batch["pixel_values"])[0], batch["image_ids"]
        if self.mode == "c":
            image = self.model.middleware.clip_projector(visual)
            text = self.model.middleware.embed_text(batch["itc_ids"], batch["itc_mask"])
            return {"itc_tower": self.model.objectives["itc"](image, text, image_ids_B=ids)}
        itc, right = (TextStream(task, batch[f"{task}_ids"], batch[f"{task}_mask"]) for task in ("itc", "itm"))
        others = other_pictures(ids)
        if self.negatives == "random" or self.global_step < self.mined_from_step:
            wrong = wrong_texts(right, random_negatives(len(ids), ids.device, others))
            reads = self.model.middleware.stream_states(visual, [wrong, right, itc])
        else:
            reads = self.model.middleware.stream_states(visual, [right, itc])
            features = itc_features(self.model, reads[1], itc)
            wrong = wrong_texts(right, mined_negatives(similarity(self.model, *features), others))
            reads = self.model.middleware.stream_states(visual, [wrong]) + reads
        return retrieval_losses(self.model, visual, reads, itc, ids, others.any(dim=1))

    def counts(self, batch: Batch) -> dict[str, float]:
        """Pairs that ITM judges: every picture with its caption and, if any, a wrong one."""
        judged = other_pictures(batch["image_ids"]).any(dim=1)
        return {"itm": len(judged) + int(judged.sum())} if self.mode == "g" else {}


def wrong_texts(right: TextStream, negatives_B: Tensor) -> TextStream:
    """The ITM stream that shows every picture with the caption of another one."""
    return TextStream("itm", right.ids[negatives_B], right.mask[negatives_B])


def retrieval_losses(
    model: VLM,
    visual_BPD: Tensor,
    reads: list[tuple[Tensor, Tensor]],
    itc: TextStream,
    image_ids_B: Tensor,
    judged_B: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of the three streams, in the order ITM wrong, ITM right, ITC of the official
    forward; their sum is the total.

    Args:
        judged_B: False for pictures that have no wrong text, because the whole batch shows the same
            picture.
    """
    (wrong, _), (right, _), read_itc = reads
    no_match = torch.zeros_like(image_ids_B)
    if judged_B is not None:
        no_match = no_match.masked_fill(~judged_B, IGNORE_INDEX)
    labels = torch.cat([no_match, torch.ones_like(image_ids_B)])
    queried, text = itc_features(model, read_itc, itc)
    contrast = model.objectives["itc"]
    return {
        "itc": contrast(queried, text, image_ids_B=image_ids_B),
        "itc_tower": contrast(model.middleware.clip_projector(visual_BPD), text, image_ids_B=image_ids_B),
        "itm": model.objectives["itm"](torch.cat([wrong, right]), labels),
    }
