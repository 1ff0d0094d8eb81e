"""Finding the captions of a picture and the pictures of a caption, among as many as there are.

Similarities are never all held at once: a block of rows is compared with all columns, and its best
columns are kept.
Letters: N pictures, T captions, Q embeddings of a picture where it has several, E contrastive
    width, K best columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_internvl.data.collate.chats import pad_rows
from lightning_internvl.data.files.captions import read_captions
from lightning_internvl.data.files.lazy_pictures import LazyPictures, Pictures
from lightning_internvl.data.scenes.language import LANGUAGES
from lightning_internvl.evaluation.features import TaskPictures, encode_images, scenes_of, share_of, ties_against
from lightning_internvl.inference.predictor import Metrics, Predictor, in_precision
from lightning_internvl.messages import check_choice
from lightning_internvl.middleware.text_streams import TextStream
from lightning_internvl.objectives import similarities

Best = tuple[Tensor, Tensor]  # similarities and places
BLOCK = 16 * 2**20  # similarities held at once


class ImageTextRetrieval:
    """Recall at k in both directions: the share of pictures with one of their captions among the
    best k, and of captions with their picture among them. With `rerank` the matching head reorders
    the best of each.

    Args:
        path: a file of captions (see `read_captions`); None: the built-in scenes, one caption a
            picture.
        images: the folder where the paths of pictures start; None: that of the file.
        split: of a file with several, the one that is measured.
        per_picture: at most that many captions of a picture.
        language: of the captions of the built-in scenes.
        mode: the image embedding, "c" or "g" where the model has both.
        rerank: how many of the nearest the matching head reads, in each direction; 0 leaves it out.
        block: similarities held at once, in millions.
        samples: only that many pictures.
        max_missing: the share of pictures that may be unreadable; their captions are left out with
            them.
    """

    needs = "pairs"

    def __init__(
        self,
        *,
        path: str | None = None,
        images: str | None = None,
        split: str | None = "test",
        per_picture: int | None = 5,
        language: str = "en",
        mode: str = "c",
        rerank: int = 0,
        block: float = 16,
        top_k: Sequence[int] = (1, 5, 10),
        samples: int | None = None,
        max_missing: float = 0.01,
        version: int = 2,
    ) -> None:
        if rerank < 0 or block <= 0 or min(top_k, default=0) < 1:
            below = f"{rerank=} must be 0 or more, {block=} above 0"
            raise ValueError(f"{below}, {top_k=} numbers from 1 on")
        check_choice("language", language, LANGUAGES)
        self.path, self.images, self.split, self.per_picture, self.language = path, images, split, per_picture, language
        self.mode, self.rerank, self.block, self.top_k, self.samples = mode, rerank, int(block * 2**20), tuple(top_k), samples
        self.max_missing = max_missing

    def __call__(self, predictor: Predictor) -> Metrics:
        if self.rerank and "itm" not in predictor.model.objectives:
            needs = "a matching head, and this model has none"
            raise ValueError(f"rerank={self.rerank} needs {needs}; set rerank=0")
        images, captions, total = self._data(predictor)
        asked = TaskPictures(predictor, images, self.max_missing)
        image = predictor.embed_images(asked.images, self.mode)
        kept = asked.readable()
        image, images = image[kept], _at_places(images, kept)
        captions = [captions[place] for place in kept]
        texts = [text for own in captions for text in own]
        owner = torch.tensor([place for place, own in enumerate(captions) for _ in own])
        text, widest = predictor.embed_texts(texts), max([self.rerank, *self.top_k])
        to_text, to_image = best_of_both(image, text, widest, self.block, owner)
        nearest = to_text[1][:, 0]
        said = [texts[place] for place in nearest.tolist()]
        right = (owner[nearest] == torch.arange(len(nearest))).tolist()
        asked.keep_answers("its caption?", said, [own[0] for own in captions], right)
        name = f"{self.mode}_" if self.language == "en" else f"{self.mode}_{self.language}_"
        metrics = recalls(name, to_text[1], to_image[1], owner, self.top_k)
        if self.rerank:
            metrics |= recalls("itm_", *rerank(predictor, images, texts, to_text, to_image, self.rerank), owner, self.top_k)
        return metrics | {"captions": len(texts), "samples": len(images), "samples_asked": total}

    def _data(self, predictor: Predictor) -> tuple[Pictures, list[list[str]], int]:
        if self.path is None:
            data = scenes_of(predictor).captioned(language=self.language)
            return data.images[: self.samples], [[text] for text in data.captions[: self.samples]], len(data.captions)
        found = read_captions(self.path, self.images, self.split, self.per_picture, self.samples)
        return found.images, found.captions, found.total


def _at_places(images: Pictures, places: Sequence[int]) -> Pictures:
    if isinstance(images, LazyPictures):
        return LazyPictures(places, images.__getitem__)
    return np.asarray(images)[places]


def best_columns(
    rows: Tensor,
    columns: Tensor,
    k: int,
    block: int,
    pictures_R: Tensor | None = None,
    pictures_C: Tensor | None = None,
    texts_in_rows: bool = False,
) -> Best:
    """The most similar columns of each row, the best first: their similarities and places, both
    (rows, min(k, columns)), CPU.

    Args:
        rows, columns: normalised embeddings, one side (.., E), the other side (.., E) or (.., Q,
            E); of late interaction both (.., Q, E).
        block: similarities held at once; a row at least.
        pictures_R, pictures_C: numbers of the pictures of rows and columns, on the CPU: a column of
            a row's picture stands behind all that are as similar, so that a tie counts against the
            model.
        texts_in_rows: whether rows are texts and columns pictures, which late interaction must know.
    """
    queries = math.prod(x.shape[1] for x in (rows, columns) if x.ndim == 3)
    step, kept = max(1, block // (len(columns) * queries)), min(k, len(columns))
    values, places = [], []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        turned = texts_in_rows if part.ndim == columns.ndim == 3 else columns.ndim == 3
        scores = similarities(columns, part).T if turned else similarities(part, columns)
        ranked = scores
        if pictures_R is not None and pictures_C is not None:
            own = pictures_R[start : start + step, None] == pictures_C
            ranked = ties_against(scores, own.to(scores.device))
        best = ranked.topk(kept, dim=1).indices
        values.append(scores.gather(1, best).cpu())
        places.append(best.cpu())
    return torch.cat(values), torch.cat(places)


def best_of_both(image: Tensor, text: Tensor, k: int, block: int = BLOCK, owner_T: Tensor | None = None) -> tuple[Best, Best]:
    """The k most similar captions of each picture, and the reverse; see `best_columns`.

    Args:
        owner_T: the picture of each caption; None: they go one to one.
    """
    pictures = torch.arange(len(image))
    owner = pictures if owner_T is None else owner_T
    to_text = best_columns(image, text, k, block, pictures, owner)
    return to_text, best_columns(text, image, k, block, owner, pictures, texts_in_rows=True)


def recalls(name: str, texts_NK: Tensor, images_TK: Tensor, owner_T: Tensor, top_k: Sequence[int]) -> Metrics:
    """Recall at k from the best captions of each picture and the best pictures of each caption,
    beside chance: the same k everywhere, which belong to k pictures at most.

    Args:
        name: prefix of the names.
        owner_T: the picture of each caption.
    """
    right = {
        "image_to_text": owner_T[texts_NK] == torch.arange(len(texts_NK))[:, None],
        "text_to_image": images_TK == owner_T[:, None],
    }
    metrics: Metrics = {}
    for direction, hits in right.items():
        for k in top_k:
            metrics[f"{name}{direction}_r{k}"] = share_of(hits[:, :k].any(dim=1))
            metrics[f"{name}{direction}_r{k}_chance"] = min(k, len(texts_NK)) / len(texts_NK)
    return metrics


def rerank(
    predictor: Predictor, images: Pictures, texts: Sequence[str], to_text: Best, to_image: Best, k: int
) -> tuple[Tensor, Tensor]:
    """The best k of both directions in the order of similarity plus the logit of a match (official
    evaluation of BLIP-2 in LAVIS): places (N, k) and (T, k). What comes behind them keeps its
    order. A pair is read once, a picture encoded once."""
    near_text, near_image = to_text[1][:, :k], to_image[1][:, :k]
    pictures = torch.arange(len(near_text))[:, None].expand_as(near_text)
    captions = torch.arange(len(near_image))[:, None].expand_as(near_image)
    numbers = [pictures * len(texts) + near_text, near_image * len(texts) + captions]
    pairs = torch.unique(torch.cat([one.flatten() for one in numbers]))
    logits = match_logits(predictor, images, texts, pairs // len(texts), pairs % len(texts))
    found = []
    for (values, places), wanted in zip((to_text, to_image), numbers, strict=True):
        scores = values[:, :k] + logits[torch.searchsorted(pairs, wanted)]
        order = scores.argsort(dim=1, descending=True, stable=True)
        found.append(torch.cat([places[:, :k].gather(1, order), places[:, k:]], dim=1))
    return found[0], found[1]


@in_precision
def match_logits(predictor: Predictor, images: Pictures, texts: Sequence[str], pictures_M: Tensor, captions_M: Tensor) -> Tensor:
    """The logit of a match for each pair of a picture and a caption, (M,) float32; pairs are in the
    order of their pictures."""
    middleware, found = predictor.model.middleware, []
    step = max(1, predictor.batch_size // max(1, round(len(pictures_M) / max(1, len(images)))))
    for start in range(0, len(images), step):
        part = slice(*torch.searchsorted(pictures_M, torch.tensor([start, start + step])).tolist())
        visual = encode_images(predictor, images[start : start + step], middleware.layers[:1], predictor.pairs.processor)[0]
        own, said = pictures_M[part] - start, captions_M[part].tolist()
        for at in range(0, len(said), predictor.batch_size):
            rows = predictor.pairs.rows("itm", [texts[place] for place in said[at : at + predictor.batch_size]])
            ids, mask = (tensor.to(predictor.device) for tensor in pad_rows(*rows))
            seen = visual[own[at : at + predictor.batch_size].to(predictor.device)]
            ((queries, _),) = middleware.stream_states(seen, [TextStream("itm", ids, mask)])
            found.append(predictor.model.objectives["itm"].logits(queries)[:, 1].float().cpu())
    return torch.cat(found)
