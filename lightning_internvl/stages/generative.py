"""Stage 2: the middleware learns to contrast, match and write (InternVL section 3.3; BLIP-2 section
3.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.config.fit import without_streams
from lightning_internvl.data.gradient_accumulation import COUNTS
from lightning_internvl.messages import check_choice
from lightning_internvl.middleware.text_streams import TextStream
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import mined_negatives, other_pictures, random_negatives
from lightning_internvl.objectives.next_token import LABELLED, counts_of
from lightning_internvl.objectives.similarity import pair_names
from lightning_internvl.stages.base import Batch, Stage

NEGATIVES = ("mined", "random")


class GenerativeStage(Stage):
    """ITC + ITM + ITG over the same images, one forward of the middleware for all texts that are
    known.

    Args:
        negatives: how the wrong partners of ITM are chosen. "random" needs one forward for all
            three losses; "mined" draws them in proportion to their similarity, so ITM is read after
            ITC, at the same total cost.
        mined_from_step: before this step "mined" draws at random too. A matching head that starts
            from nothing learns little from captions that are almost right.
        matched_share: share of the pictures that ITM shows with their own caption (InternVL: 0.5).
        both_ways: ITM reads every pair, every caption with a wrong picture and every picture with a
            wrong caption, three rows a pair (BLIP-2), instead of one row a picture; `matched_share`
            then says nothing.
        same_picture: rows of the same picture (equal `image_ids`) match each other's captions in
            ITC too (COCO retrieval).
        backbone_itc: also contrast the pooled tower, as the official retrieval fine-tune does.
            Where the language model trains, this keeps mode "c" aligned with it. None: where the
            middleware pools the tower.
    """

    objectives = ("itc", "itm", "itg")
    reads_together = True  # pictures and texts (see `lightning_internvl.config.fit`)

    def __init__(
        self,
        model: VLM,
        *,
        negatives: str = "mined",
        mined_from_step: int = 0,
        matched_share: float = 0.5,
        both_ways: bool = False,
        same_picture: bool = False,
        backbone_itc: bool | None = False,
        **stage: Any,
    ) -> None:
        super().__init__(model, **stage)
        check_negatives(negatives, mined_from_step)
        if not 0.0 < matched_share < 1.0:
            raise ValueError(f"{matched_share=} must lie between 0 and 1")
        if not hasattr(model.middleware, "stream_states"):
            raise ValueError(without_streams(type(model.middleware).__name__))
        backbone_itc = hasattr(model.middleware, "clip_projector") if backbone_itc is None else backbone_itc
        if backbone_itc and not hasattr(model.middleware, "clip_projector"):
            raise ValueError(
                f"backbone_itc=True needs a middleware that pools the tower; {type(model.middleware).__name__} does not; "
                f"give stages.{self.name}.module.backbone_itc=false"
            )
        self.negatives, self.mined_from_step = negatives, mined_from_step
        self.matched_share, self.backbone_itc = matched_share, backbone_itc
        self.both_ways, self.same_picture = both_ways, same_picture

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """ITC, ITM and ITG of one batch, each a scalar."""
        middleware = self.model.middleware
        visual = self.features(batch, middleware.layers[:1])[0]
        itc = TextStream("itc", batch["itc_ids"], batch["itc_mask"])
        itg = TextStream("itg", batch["itg_ids"], batch["itg_mask"])
        others = other_pictures(batch["image_ids"]) if "image_ids" in batch else None
        random = self.negatives == "random" or self.global_step < self.mined_from_step
        if random and not self.both_ways:
            drawn = random_negatives(len(visual), visual.device, others)
            itm, match = match_texts(batch, drawn, self.matched_share, others)
            reads = middleware.stream_states(visual, [itm, itc, itg])
        else:
            reads = middleware.stream_states(visual, [itc, itg])
            scores = None if random else similarity(self.model, *itc_features(self.model, reads[0], itc))
            shown, itm, match = self._matched(batch, visual, scores, others)
            reads = middleware.stream_states(shown, [itm]) + reads
        contrast = self.model.objectives["itc"]
        pairs = pair_names(contrast, batch)
        known: dict[str, Any] = {"image_ids_B": batch["image_ids"] if self.same_picture else None, **pairs}
        known["itg_count"] = batch.get(COUNTS, {}).get(LABELLED)
        losses = three_losses(self.model, reads, itc, match, batch["itg_labels"], **known)
        if self.backbone_itc:
            text = middleware.project_text(reads[1][1], itc.mask)
            losses["itc"] = losses["itc"] + contrast(middleware.clip_projector(visual), text, **pairs)
        return losses

    def counts(self, batch: Batch) -> dict[str, float]:
        """Pairs that ITM judges (those with a wrong partner), labelled tokens of captions, and what
        their loss is divided by."""
        rows, ids = len(batch["itg_labels"]), batch.get("image_ids")
        judged = torch.ones(rows, dtype=torch.bool) if ids is None else other_pictures(ids).any(dim=1)
        matched = int(rows * self.matched_share)
        pairs = rows + 2 * int(judged.sum()) if self.both_ways else matched + int(judged[: rows - matched].sum())
        return {"itm": pairs, **counts_of(self.model.objectives["itg"], "itg", batch["itg_labels"])}

    def _matched(
        self, batch: Batch, visual: Tensor, scores_BB: Tensor | None, others: Tensor | None
    ) -> tuple[Tensor, TextStream, Tensor]:
        """Visual tokens, texts and labels of ITM; `scores` are the similarities of which wrong
        partners are mined."""

        def drawn(scores: Tensor | None) -> Tensor:
            if scores is None:
                return random_negatives(len(visual), visual.device, others)
            return mined_negatives(scores, others)

        texts = drawn(scores_BB)
        if not self.both_ways:
            return visual, *match_texts(batch, texts, self.matched_share, others)
        images = drawn(None if scores_BB is None else scores_BB.T)
        return match_both(visual, TextStream("itm", batch["itm_ids"], batch["itm_mask"]), images, texts, others)


def check_negatives(negatives: str, mined_from_step: int) -> None:
    """Refuse settings of the wrong captions that nobody knows."""
    check_choice("negatives", negatives, NEGATIVES)
    if mined_from_step < 0:
        raise ValueError(f"{mined_from_step=} must be a step, 0 or later")


def match_texts(
    batch: Batch, negatives_B: Tensor, matched_share: float = 0.5, others_BB: Tensor | None = None
) -> tuple[TextStream, Tensor]:
    """The ITM texts: the last rows of the batch, `matched_share` of them, read their own caption
    (label 1), the others a wrong one (label 0, or -100 where the batch holds no caption of another
    picture)."""
    rows = torch.arange(len(negatives_B), device=negatives_B.device)
    matched = rows >= len(rows) - int(len(rows) * matched_share)
    chosen, labels = torch.where(matched, rows, negatives_B), matched.long()
    if others_BB is not None:
        labels = labels.masked_fill(~matched & ~others_BB.any(dim=1), IGNORE_INDEX)
    return TextStream("itm", batch["itm_ids"][chosen], batch["itm_mask"][chosen]), labels


def match_both(
    visual_BPD: Tensor, right: TextStream, images_B: Tensor, texts_B: Tensor, others_BB: Tensor | None = None
) -> tuple[Tensor, TextStream, Tensor]:
    """ITM as BLIP-2 has it, 3 B rows: every pair, every caption with a wrong picture, every picture
    with a wrong caption.

    Args:
        images_B: the wrong picture of each caption.
        texts_B: the wrong caption of each picture.

    Returns:
        visual tokens (3 B, P, D), the texts, and labels: 1, then 0, or -100 where the batch holds
        no other picture
    """
    visual = torch.cat([visual_BPD, visual_BPD[images_B], visual_BPD])
    ids, mask = (torch.cat([x, x, x[texts_B]]) for x in (right.ids, right.mask))
    wrong = torch.zeros_like(texts_B)
    if others_BB is not None:
        wrong = wrong.masked_fill(~others_BB.any(dim=1), IGNORE_INDEX)
    return visual, TextStream("itm", ids, mask), torch.cat([torch.ones_like(wrong), wrong, wrong])


def itc_features(model: VLM, read: tuple[Tensor, Tensor], itc: TextStream) -> tuple[Tensor, Tensor]:
    """Image features, (B, E) or (B, Q, E), and text features (B, E) of the ITC stream."""
    queries, text = read
    return model.middleware.project_queries(queries), model.middleware.project_text(text, itc.mask)


@torch.no_grad()
def similarity(model: VLM, image: Tensor, text_BE: Tensor) -> Tensor:
    """Scaled cosine similarities (B, B)."""
    return model.objectives["itc"].logits(F.normalize(image, dim=-1), F.normalize(text_BE, dim=-1))


def three_losses(
    model: VLM,
    reads: list[tuple[Tensor, Tensor]],
    itc: TextStream,
    match_B: Tensor,
    itg_labels_BL: Tensor,
    itc_ignored_B: Tensor | None = None,
    image_ids_B: Tensor | None = None,
    pair_ids_B: Tensor | None = None,
    itg_count: int | None = None,
) -> dict[str, Tensor]:
    """The losses of the three streams, in the order ITM, ITC, ITG of the official forward.

    The official code leaves out pairs without a caption: such rows have -100 in `match_B` and True
    in `itc_ignored_B`. Ids are as ITC takes them.
    """
    read_itm, read_itc, read_itg = reads
    pairs = {} if pair_ids_B is None else {"pair_ids_B": pair_ids_B}
    return {
        "itm": model.objectives["itm"](read_itm[0], match_B),
        "itc": model.objectives["itc"](*itc_features(model, read_itc, itc), itc_ignored_B, image_ids_B, **pairs),
        "itg": model.objectives["itg"](read_itg[1], itg_labels_BL, model.middleware.head, count=itg_count),
    }
