"""A folder of pictures that is searched with words, by a model with one space for both.

Letters: N pictures, Q embeddings of a picture (1; BLIP-2 has some, late interaction one a token), E contrastive width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_internvl.choices import EMBEDDING
from lightning_internvl.data.files.images import IMAGE_SUFFIXES, is_image_file, read_image
from lightning_internvl.inference.embeddings import Pairs, embed_pictures, embed_texts, normalised
from lightning_internvl.inference.predictor import Precision
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import similarities
from lightning_internvl.objectives.embedding import joined


class Retriever:
    """Embeddings of pictures and texts by a model that compares them.

    Args:
        pairs: how the model sees pictures and texts.
        mode: of `encode_image`, where the model has several.
        batch_size: pictures or texts at a time.
        precision: makes the context that the model runs in; embeddings are compared in float32.
    """

    def __init__(
        self, model: VLM, pairs: Pairs, mode: str = "c", batch_size: int = 64, precision: Precision = nullcontext
    ) -> None:
        self.model, self.pairs, self.mode, self.batch_size = model.eval(), pairs, mode, batch_size
        self.precision = precision

    @property
    def late(self) -> bool:
        """Whether texts have a vector a token, too."""
        return EMBEDDING in self.model.objectives and self.model.objectives[EMBEDDING].late

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Pictures (H, W, 3) uint8 of any size -> (N, Q, E), normalised."""
        with self.precision():
            embeds = normalised([embed_pictures(self.model, self.pairs, part, self.mode) for part in self._parts(images)])
        return embeds if embeds.ndim == 3 else embeds[:, None]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, E), or with late interaction (N, L, E), normalised."""
        with self.precision():
            return normalised([embed_texts(self.model, self.pairs, part) for part in self._parts(texts)])

    def _parts(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        return (items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size))


class SearchHit(NamedTuple):
    """A picture and its cosine similarity to what was looked for."""

    path: Path
    similarity: float


class Gallery:
    """The pictures of a folder, at any depth, in the order of their names.

    Raises:
        ValueError: for a folder that is not there or holds no picture.
    """

    def __init__(self, folder: str | Path, retriever: Retriever) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder")
        self.paths = sorted(path for path in Path(folder).rglob("*") if is_image_file(path))
        if not self.paths:
            known = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"{folder} holds no picture; known endings: {known}")
        self.retriever = retriever
        size = retriever.batch_size
        parts = (self.paths[i : i + size] for i in range(0, len(self.paths), size))
        pictures = ([read_image(path) for path in part] for part in parts)
        self.embeds_NQE = joined([retriever.images(images) for images in pictures])

    def search(self, texts: Sequence[str], count: int) -> list[list[SearchHit]]:
        """For each text the `count` pictures nearest to it, or all, the best first."""
        similarity_TN = similarities(self.embeds_NQE, self.retriever.texts(texts)).T
        values, places = similarity_TN.topk(min(count, len(self.paths)), dim=1)
        return [
            [SearchHit(self.paths[place], value) for value, place in zip(*row, strict=True)]
            for row in zip(values.tolist(), places.tolist(), strict=True)
        ]
