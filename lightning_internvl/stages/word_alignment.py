"""A start for a new connector in front of a language model that knows its words: visual tokens are
drawn to those of captions.

The language model does not run, only its table of embeddings is read, so a step costs little more
than the tower. What follows, the usual alignment through the whole model, starts from visual tokens
that lie where words lie, and at their length, instead of from noise many times as loud. Token by
token the contrast is that of FILIP (Yao et al. 2021, section 3.1).

Letters: B samples of this rank, C captions of all ranks, P visual tokens of a sample, L words of a
caption, H decoder width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.gradient_accumulation import COUNTS
from lightning_internvl.distributed.collectives import all_reduce_max, gather, gather_with_grad, global_mean, rank
from lightning_internvl.stages.base import Batch, Stage

NEVER = -2.0  # below every cosine
LONGEST = "words"  # of the counts of a batch: words of its longest caption
MOST_SEEN = "placeholders"  # of the counts of a batch: those of the sample that has most


class WordStage(Stage):
    """Draws visual tokens to the words that describe their pictures and away from those of other
    pictures. A sample is a conversation of any length about any number of pictures or videos; one
    without a picture is compared with and not judged. A word counts the more the fewer captions of
    the batch hold it."""

    objectives = ("itc",)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`itc` contrasts mean visual tokens with mean words; `tokens` the best word of each visual
        token and the best visual token of each word; `distance` is that of a visual token from its
        best word, squared, in units of the words' spread.

        Every rank compares its pictures with the captions of all, and its captions with the
        pictures of all.
        """
        embed = self.model.decoder.embed
        known: dict[str, Any] = batch.get(COUNTS) or ({} if batch["labels"].is_meta else self.counts(batch))
        ids_CL = described_words(batch["input_ids"], batch["labels"], known.get(LONGEST))
        rarity_CL = rarity(ids_CL)
        words_CLH = embed(ids_CL.clamp(min=0)).float()
        centre_H = mean_of_distinct(words_CLH, ids_CL)

        seen_BPH, shown_BP = self._seen(batch, known.get(MOST_SEEN))
        seen_CPH, shown_CP = gather_with_grad(seen_BPH), gather(shown_BP)
        first = rank() * len(seen_BPH)
        own = slice(first, first + len(seen_BPH))

        near_BPH = F.normalize(seen_BPH - centre_H, dim=-1)
        near_CPH = F.normalize(seen_CPH - centre_H, dim=-1)
        near_CLH = F.normalize(words_CLH - centre_H, dim=-1)
        # in few captions: what one shows, not what stands in every sentence
        telling_CL = rarity_CL > 1
        to_text = token_scores(near_BPH, near_CLH, rarity_CL, telling_CL, shown_BP)
        to_image = token_scores(near_CPH, near_CLH[own], rarity_CL[own], telling_CL[own], shown_CP)

        target_B = torch.arange(len(seen_BPH), device=seen_BPH.device) + first
        target_B = target_B.masked_fill(~shown_BP.any(dim=1), IGNORE_INDEX)
        scale = self.model.objectives["itc"].scale
        rows = [*to_text, *(scores_CB.T for scores_CB in to_image)]
        losses = [cross_entropy(scale * scores_BC, target_B) for scores_BC in rows]
        spread = variance(words_CLH.detach(), telling_CL).clamp(min=1e-6)
        near_own = near_BPH, near_CLH[own], telling_CL[own], shown_BP
        return {
            "itc": self._means(seen_CPH, words_CLH, rarity_CL, shown_CP, own),
            "tokens": sum(losses[1:], losses[0]) / len(losses),
            "distance": self._distance(seen_BPH, words_CLH[own].detach(), *near_own) / spread,
        }

    def counts(self, batch: Batch) -> dict[str, float]:
        """Of no loss, but sizes that a step would ask the device for: words of the longest caption,
        and placeholders of the sample that has most."""
        longest = int((batch["labels"] != IGNORE_INDEX).sum(dim=1).max())
        return {LONGEST: longest, MOST_SEEN: int(self.model.visual_places(batch["input_ids"]).sum(dim=1).max())}

    def _seen(self, batch: Batch, most: int | None) -> tuple[Tensor, Tensor]:
        """Visual tokens of each sample in order, and which are there: (B, P, H) and (B, P).

        Args:
            most: placeholders of the sample that has most; None on the meta device.
        """
        seen_BPH, shown_BP = self.model.visual_in_rows(None if most is None else all_reduce_max(most), **batch)
        return seen_BPH.float().masked_fill(~shown_BP[..., None], 0.0), shown_BP

    def _means(self, seen_CPH: Tensor, words_CLH: Tensor, rarity_CL: Tensor, shown_CP: Tensor, own: slice) -> Tensor:
        seen_CH = seen_CPH.sum(dim=1) / shown_CP.sum(dim=1, keepdim=True).clamp(min=1)
        words_CH, blind_C = mean_word(words_CLH, rarity_CL), ~shown_CP.any(dim=1)
        centre_H = seen_CH.sum(dim=0) / (~blind_C).sum().clamp(min=1)
        seen_CH = (seen_CH - centre_H).masked_fill(blind_C[:, None], 0.0)
        return self.model.objectives["itc"](seen_CH[own], (words_CH - words_CH.mean(dim=0))[own], blind_C[own])

    def _distance(
        self, seen_BPH: Tensor, words_BLH: Tensor, near_BPH: Tensor, near_BLH: Tensor, telling_BL: Tensor, shown_BP: Tensor
    ) -> Tensor:
        """Mean square of a visual token less the telling word of its caption that is most similar to it."""
        similar_BPL = (near_BPH @ near_BLH.mT).masked_fill(~telling_BL[:, None], NEVER)
        best_BPH = words_BLH.gather(1, similar_BPL.argmax(dim=-1)[..., None].expand(-1, -1, words_BLH.shape[-1]))
        judged_BP = shown_BP & telling_BL.any(dim=1, keepdim=True)
        squares_BP = (seen_BPH - best_BPH).square().mean(dim=-1).masked_fill(~judged_BP, 0.0)
        return global_mean(squares_BP.sum(), judged_BP.sum())


def described_words(ids_BL: Tensor, labels_BL: Tensor, longest: int | None = None) -> Tensor:
    """The words that are learnt, of the captions of all ranks, -1 behind the last one: (C, L).

    Args:
        longest: words of this rank's longest caption, where the host knows it; a GPU is then not
            asked for it. Several ranks still agree on a length.
    """
    learnt_BL = labels_BL != IGNORE_INDEX
    if longest is None:  # a plan, whose tensors have no values, takes the longest row that there may be
        longest = learnt_BL.shape[1] if learnt_BL.is_meta else int(learnt_BL.sum(dim=1).max())
    order_BL = (~learnt_BL).int().argsort(dim=1, stable=True)[:, :longest]
    ids_BL = ids_BL.gather(1, order_BL).masked_fill(~learnt_BL.gather(1, order_BL), -1)
    return gather(F.pad(ids_BL, (0, all_reduce_max(longest) - longest), value=-1))


def places_of_words(ids_CL: Tensor) -> Tensor:
    """The place of each word among the distinct ones, (C, L); of `Tensor.unique` the host would
    wait for how many these are."""
    sorted_N, order_N = ids_CL.flatten().sort(stable=True)
    places_N = F.pad(sorted_N[1:] != sorted_N[:-1], (1, 0)).cumsum(dim=0)
    return torch.zeros_like(order_N).scatter_(0, order_N, places_N).view_as(ids_CL)


def rarity(ids_CL: Tensor) -> Tensor:
    """log(captions / captions with this word), 0 for a word of all captions, -1 behind the last
    word: (C, L)."""
    places_CL = places_of_words(ids_CL)
    holds = torch.zeros(len(ids_CL), ids_CL.numel(), device=ids_CL.device).scatter_(1, places_CL, 1.0)
    return (len(ids_CL) / holds.sum(dim=0)).log()[places_CL].masked_fill(ids_CL < 0, -1.0)


def mean_of_distinct(words_CLH: Tensor, ids_CL: Tensor) -> Tensor:
    """The mean of the words that occur, each once however often it does: (H,)."""
    places_N = places_of_words(ids_CL).flatten()
    times_N = torch.zeros(len(places_N), device=ids_CL.device).scatter_add_(0, places_N, torch.ones_like(places_N).float())
    weights_CL = (1 / times_N[places_N]).view_as(ids_CL).masked_fill(ids_CL < 0, 0.0)
    return (words_CLH * weights_CL[..., None]).sum(dim=(0, 1)) / weights_CL.sum()


def variance(x_BLH: Tensor, chosen_BL: Tensor) -> Tensor:
    """Of all elements where a place is chosen, a scalar."""
    chosen_BL1 = chosen_BL[..., None]
    number = (chosen_BL.sum() * x_BLH.shape[-1]).clamp(min=2)
    mean = x_BLH.masked_fill(~chosen_BL1, 0.0).sum() / number
    return (x_BLH - mean).masked_fill(~chosen_BL1, 0.0).square().sum() / (number - 1)


def mean_word(words_CLH: Tensor, rarity_CL: Tensor) -> Tensor:
    """The mean of each caption's words by their rarity: (C, H)."""
    weights_CL = rarity_CL.clamp(min=0)
    return (words_CLH * weights_CL[..., None]).sum(dim=1) / weights_CL.sum(dim=1).clamp(min=1e-6)[:, None]


def cross_entropy(scores_BC: Tensor, target_B: Tensor) -> Tensor:
    """This rank's share of the mean over the rows of all ranks that have a target; 0 where none has."""
    total = F.cross_entropy(scores_BC, target_B, ignore_index=IGNORE_INDEX, reduction="sum")
    return global_mean(total, (target_B != IGNORE_INDEX).sum())


def token_scores(
    seen_BPH: Tensor, words_CLH: Tensor, rarity_CL: Tensor, telling_CL: Tensor, shown_BP: Tensor
) -> tuple[Tensor, Tensor]:
    """Similarities of pictures and captions, (B, C) each, given rows of length 1: the mean over
    visual tokens of the best telling word, and the mean over words, by their rarity, of the best
    visual token."""
    similar_BCPL = torch.einsum("bph,clh->bcpl", seen_BPH, words_CLH)
    best_BCP = similar_BCPL.masked_fill(~telling_CL[None, :, None], NEVER).amax(dim=-1)
    shares_B1P = (shown_BP / shown_BP.sum(dim=1, keepdim=True).clamp(min=1))[:, None]
    by_seen = (best_BCP * shares_B1P).sum(dim=-1)
    weights_CL = rarity_CL.clamp(min=0)
    best_BCL = similar_BCPL.masked_fill(~shown_BP[:, None, :, None], NEVER).amax(dim=2)
    by_word = (best_BCL * weights_CL).sum(dim=-1) / weights_CL.sum(dim=-1).clamp(min=1e-6)
    return by_seen, by_word
