"""Contrast of embeddings that a decoder makes of texts and pictures: each query finds its document among
those of all processes and among wrong ones that the data names.

Letters: B queries of this rank, C queries of all ranks, K wrong documents of each query, D documents
(B * (1 + K), the right ones first), R rows, L length, H decoder width, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.choices import LATE, NOTHING, embedding_faults, embedding_width
from lightning_internvl.distributed.collectives import all_reduce_max, gather, gather_with_grad, rank
from lightning_internvl.layers.chunking import check_chunk, checkpointed_chunks, number_of_chunks
from lightning_internvl.messages import check_number
from lightning_internvl.objectives.similarity import APART, late_similarities, products

TERM = "embedding"  # the loss of whole embeddings; of the first numbers alone: embedding_64


class Known(NamedTuple):
    """Names of what is compared, whole numbers, equal for equal content: of queries (C,), of
    their documents (C,) and of wrong documents (C * K,), of all ranks; -1 where there is none."""

    queries: Tensor
    documents: Tensor
    wrong: Tensor


class EmbeddingContrast(nn.Module):
    """Pools the last states of a decoder, and contrasts the embeddings: cross-entropy of scaled cosines
    with the right document among all (van den Oord et al. 2018; MultipleNegativesRankingLoss of
    sentence-transformers).

    Args:
        pooling: "last" token, "mean" of all tokens, or "late" interaction: a vector a token, of
            which each of the query finds its best of the document (Khattab and Zaharia 2020,
            ColBERT section 3.3), and the mean of these cosines counts.
        width: of embeddings, by a linear layer; None: the decoder's own, and 128 for "late"
            (ColPali).
        widths: numbers of first elements that are contrasted by themselves too, so that embeddings
            can be cut (Kusupati et al. 2022, Matryoshka).
        width_weights: weights of their losses beside 1 of whole embeddings; None: 1 each.
        symmetric: whether documents find their queries too; the mean of both losses counts.
        init_scale: start of the scale (the inverse of the temperature).
        max_scale: the scale is held below this while it trains.
        learn_scale: False keeps the scale as it is, and out of checkpoints.
        chunk: rows that are compared at a time; each chunk is computed a second time for its
            gradient. None: all rows.

    Attributes:
        weights: of the losses.

    Raises:
        ValueError: for a pooling that is not known, and widths that an embedding does not have.
    """

    compares: str | None = None  # embeddings of the decoder, whatever the middleware embeds

    def __init__(
        self,
        *,
        decoder_dim: int,
        pooling: str = "last",
        width: int | None = None,
        widths: Sequence[int] | None = None,
        width_weights: Sequence[float] | None = None,
        symmetric: bool = True,
        init_scale: float = 20.0,
        max_scale: float = 100.0,
        learn_scale: bool = True,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_chunk("chunk", chunk)
        check_number("init_scale", init_scale, above=0)
        sizes = {"pooling": pooling, "width": width, "widths": widths, "width_weights": width_weights}
        for fault in embedding_faults(sizes, decoder_dim):
            raise ValueError(fault)
        whole = embedding_width(pooling, width, decoder_dim)
        given = dict(zip(widths or (), width_weights or [1.0] * len(widths or ()), strict=True))
        self.widths = {TERM: whole, **{f"{TERM}_{one}": one for one in given}}
        self.weights = {TERM: 1.0, **{f"{TERM}_{one}": weight for one, weight in given.items()}}
        self.pooling, self.symmetric, self.chunk = pooling, symmetric, chunk
        projects = width is not None or pooling == LATE
        self.project = nn.Linear(decoder_dim, whole) if projects else nn.Identity()
        # Stored as a logarithm, and with one dimension because sharding refuses scalars.
        scale = torch.tensor([math.log(init_scale)])
        self.max_log_scale = math.log(max_scale)
        if learn_scale:
            self.logit_scale = nn.Parameter(scale)
        else:
            self.register_buffer("logit_scale", scale, persistent=False)

    @property
    def late(self) -> bool:
        """Whether an embedding is a vector a token."""
        return self.pooling == LATE

    def embed(self, hidden_RLH: Tensor, mask_RL: Tensor) -> Tensor:
        """Embeddings of rows that are padded on the right, not normalised: (R, E), or with a vector a
        token (R, L, E), zero at padding."""
        mask_RL1 = mask_RL[..., None].bool()
        if self.late:
            return self.project(hidden_RLH).masked_fill(~mask_RL1, 0.0)
        if self.pooling == "mean":
            total_RH = hidden_RLH.masked_fill(~mask_RL1, 0.0).sum(dim=1)
            return self.project(total_RH / mask_RL1.sum(dim=1))
        last_R11 = (mask_RL.sum(dim=1) - 1)[:, None, None]
        return self.project(hidden_RLH.gather(1, last_R11.expand(-1, 1, hidden_RLH.shape[-1])).squeeze(1))

    def forward(
        self, query: Tensor, document: Tensor, query_ids_B: Tensor | None = None, document_ids_D: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses, a scalar for each width, from embeddings (B, E) and (D, E), or (B, L, E) and
        (D, M, E).

        Args:
            query_ids_B, document_ids_D: whole numbers that name contents. A query is not compared
                with its own document elsewhere, nor with the document of an equal query, nor with a
                document of the number -1.
        """
        if self.training and self.logit_scale.requires_grad:
            self.logit_scale.data.clamp_(max=self.max_log_scale)  # in place: see `ITC`
        count = len(query)
        right, wrong = _gathered(document[:count]), _gathered(document[count:])
        queries, known = _gathered(query), None
        if query_ids_B is not None and document_ids_D is not None:
            known = Known(gather(query_ids_B), gather(document_ids_D[:count]), gather(document_ids_D[count:]))
        columns = torch.cat([right, wrong])
        own_B = torch.arange(count, device=query.device) + rank() * count
        losses = {}
        for name, width in self.widths.items():
            rows, all_rows, found, all_found = (
                F.normalize(x[..., :width].float(), dim=-1) for x in (query, queries, document[:count], columns)
            )
            loss = self._loss(rows, all_found, own_B, known)
            if self.symmetric:
                loss = (loss + self._loss(found, all_rows, own_B, known, reverse=True)) / 2
            losses[name] = loss
        return losses

    def _loss(self, rows: Tensor, columns: Tensor, own_B: Tensor, known: Known | None, reverse: bool = False) -> Tensor:
        """Mean cross-entropy of rows against columns; `reverse`: of documents against queries."""

        def judge(rows: Tensor, own: Tensor) -> Tensor:
            scores = _scores(columns, rows).T if reverse else _scores(rows, columns)
            logits = self.logit_scale.float().exp() * scores
            if known is not None:
                logits = logits.masked_fill(_also_right(known, own, reverse), APART)
            return F.cross_entropy(logits, own, reduction="none")

        pieces = number_of_chunks(len(rows), self.chunk)
        if pieces == 1:
            return judge(rows, own_B).mean()
        return torch.cat(checkpointed_chunks(judge, pieces, rows, own_B)).mean()


def _scores(query: Tensor, document: Tensor) -> Tensor:
    return products(query, document) if query.ndim == 2 else late_similarities(query, document)


def _also_right(known: Known, own_B: Tensor, reverse: bool) -> Tensor:
    """Where a column is as right as a row's own, and is not that: among all documents (B, C + C * K), or
    with `reverse` among all queries (B, C)."""
    same_query = known.queries[own_B][:, None] == known.queries
    same_document = known.documents[own_B][:, None] == known.documents
    itself = own_B[:, None] == torch.arange(len(known.queries), device=own_B.device)
    found = (same_query | same_document) & ~itself
    if reverse:
        return found
    wrong = (known.documents[own_B][:, None] == known.wrong) | (known.wrong == NOTHING)
    return torch.cat([found, wrong], dim=1)


def _gathered(x: Tensor) -> Tensor:
    """Rows of all ranks with gradient; vectors of tokens are padded to the longest row of all."""
    return gather_with_grad(longer(x, all_reduce_max(x.shape[1])) if x.ndim == 3 else x)


def longer(x_RLE: Tensor, length: int) -> Tensor:
    """Vectors of tokens with zeros behind them: (R, length, E)."""
    return F.pad(x_RLE, (0, 0, 0, length - x_RLE.shape[1]))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Embeddings of several batches as one: (R, E), or (R, longest row, E)."""
    if parts[0].ndim == 2:
        return torch.cat(list(parts))
    length = max(part.shape[1] for part in parts)
    return torch.cat([longer(part, length) for part in parts])
