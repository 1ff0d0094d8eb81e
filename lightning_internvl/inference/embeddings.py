"""Embeddings of pictures and texts, by a middleware that reads texts or by the decoder of the stage
`embed`.

Letters: N pictures or texts, Q embeddings of one where it has several, E width.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.data.collate.base import ON_HOST, pad_rows
from lightning_internvl.data.collate.embedding import EmbeddingCollator
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.inference.device import on_device
from lightning_internvl.model.row_embeddings import embed_rows
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives.embedding import joined

Pairs = PairCollator | EmbeddingCollator


def embed_pictures(model: VLM, pairs: Pairs, images: Sequence[np.ndarray], mode: str = "c") -> Tensor:
    """Pictures (H, W, 3) uint8 -> (N, E) or (N, Q, E), as documents."""
    if isinstance(pairs, EmbeddingCollator):
        return embed_rows(model, placed(model, pairs.pictures(images))).float()
    pixels = pairs.pixels(images, [f"picture {place}" for place in range(len(images))])
    return model.encode_image(on_device(model, pixels), mode).float()


def embed_texts(model: VLM, pairs: Pairs, texts: Sequence[str]) -> Tensor:
    """Texts -> (N, E), or with late interaction (N, Q, E), as queries."""
    if isinstance(pairs, EmbeddingCollator):
        return embed_rows(model, placed(model, pairs.texts(texts))).float()
    ids, mask = (on_device(model, x) for x in pad_rows(*pairs.rows("itc", texts)))
    return model.encode_text(ids, mask).float()


def text_lengths(pairs: Pairs, texts: Sequence[str]) -> list[int]:
    """Tokens of texts, of which none is cut."""
    if not texts:
        return []
    whole = copy.copy(pairs)
    whole.max_length = sys.maxsize
    if isinstance(whole, EmbeddingCollator):
        return whole.texts(texts)["attention_mask"].sum(dim=1).tolist()
    return [len(row) for row in whole.rows("itc", texts)[0]]


def normalised(parts: Sequence[Tensor]) -> Tensor:
    """Embeddings of several batches as one, of length 1; of late interaction zero behind the last token."""
    return F.normalize(joined(parts), dim=-1)


def placed(model: VLM, rows: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of rows where the model is, but for what the host reads."""
    return {n: on_device(model, x) if isinstance(x, torch.Tensor) and n not in ON_HOST else x for n, x in rows.items()}
