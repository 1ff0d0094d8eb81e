"""Products of embeddings, as contrastive losses and retrieval compare them, and the loss of such
rows.

Letters: B rows, C columns, E width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.distributed.collectives import gather

Names = tuple[Tensor | None, Tensor | None]  # of pictures and of pairs, whole numbers

APART = -1e9  # a logit that has no probability, and no NaN with a target of 0


def products(rows: Tensor, columns_CE: Tensor) -> Tensor:
    """All rows (..., E) with all columns (C, E): (..., C), in float32 whatever trains in bf16.

    Multiplied by a scale of 100, similarities that were computed in bf16 would be multiples of 0.25
    or 0.5.
    """
    exact = nullcontext() if rows.is_meta else torch.autocast(rows.device.type, enabled=False)
    with exact:  # the meta device, on which runs are planned, has no autocast
        return rows.float() @ columns_CE.float().T


def late_similarities(query_BLE: Tensor, document_CME: Tensor) -> Tensor:
    """Late interaction (Khattab and Zaharia 2020, section 3.3) of normalised vectors of tokens, zero
    where there is none: for each token of a query the cosine with its best token of a document, the
    mean over the query: (B, C), float32."""
    exact = nullcontext() if query_BLE.is_meta else torch.autocast(query_BLE.device.type, enabled=False)
    with exact:
        similar_BCLM = torch.einsum("ble,cme->bclm", query_BLE.float(), document_CME.float())
    there_CM, asked_BL = (x.any(dim=-1) for x in (document_CME, query_BLE))
    best_BCL = similar_BCLM.masked_fill(~there_CM[None, :, None], APART).amax(dim=-1)
    asked_B1L = asked_BL[:, None]
    return best_BCL.masked_fill(~asked_B1L, 0.0).sum(dim=-1) / asked_B1L.sum(dim=-1).clamp(min=1)


def contrast(
    logits_BC: Tensor,
    own_B: Tensor,
    image_ids_C: Tensor | None = None,
    pair_ids_C: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of rows against columns, one of which is a row's own.

    Args:
        own_B: the place of each row's own column.
        image_ids_C: whole numbers that name the pictures of columns. A row then matches all columns
            of its picture, to equal shares; `pair_ids_C` is not looked at.
        pair_ids_C: whole numbers that name the pairs of columns. The same pair elsewhere, as where
            a batch is larger than what is left of an epoch, is not compared with.
        label_smoothing: share of the target spread over all columns that are compared with.
        reduction: "mean", or "none" for the loss of each row.
    """
    if image_ids_C is not None:
        same = (image_ids_C[own_B][:, None] == image_ids_C).float()
        shares = same / same.sum(dim=1, keepdim=True)
        return F.cross_entropy(logits_BC, shares, label_smoothing=label_smoothing, reduction=reduction)
    if pair_ids_C is None:
        return F.cross_entropy(logits_BC, own_B, label_smoothing=label_smoothing, reduction=reduction)
    own = own_B[:, None] == torch.arange(logits_BC.shape[1], device=own_B.device)
    again = same_pair(pair_ids_C[own_B], pair_ids_C, own)
    logits = logits_BC.masked_fill(again, APART)
    if not label_smoothing:
        return F.cross_entropy(logits, own_B, reduction=reduction)
    compared = (~again).float()
    shares = (1 - label_smoothing) * own + label_smoothing * compared / compared.sum(dim=1, keepdim=True)
    return F.cross_entropy(logits, shares, reduction=reduction)


def pair_names(objective: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The names of the pairs of a batch as an argument of a contrastive loss, if it takes them: one
    of the user's own need not."""
    known = "pair_ids" in batch and "pair_ids_B" in inspect.signature(objective.forward).parameters
    return {"pair_ids_B": batch["pair_ids"]} if known else {}


def gathered(ids_B: Tensor | None) -> Tensor | None:
    """Names of rows of all ranks, where there are names."""
    return None if ids_B is None else gather(ids_B)


def same_pair(pair_ids_B: Tensor, pair_ids_C: Tensor, own_BC: Tensor) -> Tensor:
    """(B, C) True where a column is the pair of a row once more, and not the row's own column."""
    return (pair_ids_B[:, None] == pair_ids_C) & ~own_BC
