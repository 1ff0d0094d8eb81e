"""The decoder embeds texts and pictures: each query finds its document (E5-Mistral, Wang et al. 2023;
VLM2Vec, Jiang et al. 2024; with late interaction ColPali, Faysse et al. 2024).

Letters: B queries of this rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from lightning_internvl.config.fit import unembedding
from lightning_internvl.data.collate.embedding import DOCUMENTS, QUERIES
from lightning_internvl.layers.chunking import check_chunk, checkpointed
from lightning_internvl.model.row_embeddings import embed_rows
from lightning_internvl.model.vlm import shifts_labels
from lightning_internvl.objectives.embedding import joined
from lightning_internvl.stages.base import Batch, Stage


class EmbeddingStage(Stage):
    """Contrast of what the decoder's last states say of queries and of documents (see
    `lightning_internvl.objectives.embedding`).

    Args:
        cached_chunk: rows of queries, and of documents, that are embedded at a time, so that a batch
            may be larger than what memory holds (see `ContrastiveStage`). None: all at once.
        stage: settings of `Stage`. The objective's weights of its terms hold where `weights` names
            none.
    """

    objectives = ("embedding",)

    def __init__(self, model: Any, *, cached_chunk: int | None = None, **stage: Any) -> None:
        super().__init__(model, **stage)
        check_chunk("cached_chunk", cached_chunk)
        if not shifts_labels(model.decoder):
            raise ValueError(unembedding(type(model.decoder).__name__))
        self.cached_chunk = cached_chunk
        self.weights = {**model.objectives["embedding"].weights, **self.weights}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The contrast of a batch by the width of embeddings, a scalar each."""
        queries, documents = batch[QUERIES], batch[DOCUMENTS]
        parts = [(part,) for part in (*queries, *documents)]
        embed = partial(embed_rows, self.model)
        whole = len(queries) == 1
        found = [embed(*part) for part in parts] if whole else checkpointed(embed, parts, draws=True, keep_last=True)
        embeds = joined(found[: len(queries)]), joined(found[len(queries) :])
        return self.model.objectives["embedding"](*embeds, batch["query_ids"], batch["document_ids"])
