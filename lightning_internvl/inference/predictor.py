"""A model in use: embeddings, captions and answers in batches, as the evaluation tasks and the
sample pictures need them.

Letters: N images, E contrastive width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from lightning_internvl.data.collate.chats import ChatCollator, pad_rows
from lightning_internvl.data.collate.labels import LabelCollator
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.files.lazy_pictures import Pictures
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.data.templates import IMAGE, message_of
from lightning_internvl.inference.device import on_device
from lightning_internvl.inference.embeddings import embed_pictures, embed_texts, normalised
from lightning_internvl.inference.journal import Journal
from lightning_internvl.layers.finite import FiniteLogits, check_finite
from lightning_internvl.model.vlm import VLM

Metrics = dict[str, float]  # what a task returns
Precision = Callable[[], AbstractContextManager[Any]]  # makes the context that a model runs in


P = ParamSpec("P")
R = TypeVar("R")


def in_precision(run: Callable[Concatenate[Predictor, P], R]) -> Callable[Concatenate[Predictor, P], R]:
    """A function that runs the model of a predictor, in the predictor's precision. What tasks make
    of its results is computed outside: similarities in bfloat16 would agree in their first
    digits."""

    @wraps(run)
    def wrapped(predictor: Predictor, *args: P.args, **kwargs: P.kwargs) -> R:
        with predictor.precision():
            return run(predictor, *args, **kwargs)

    return wrapped


class Predictor:
    """A model with its collators and the held-out data.

    Args:
        pairs: how texts and pictures are prepared for a middleware that reads texts; None without
            one.
        chats: how conversations are prepared for the decoder; None without one.
        labels: how pictures are prepared for a probe; None without one. Of these three a task is
            given what it needs.
        batch_size: squares that the encoder sees at a time.
        journal: where tasks keep answers and pictures; by default nothing is written.
    """

    def __init__(
        self,
        model: VLM,
        held_out: HeldOutScenes,
        *,
        pairs: PairCollator | Any = None,
        chats: ChatCollator | Any = None,
        labels: LabelCollator | Any = None,
        batch_size: int = 125,
        journal: Journal | None = None,
    ) -> None:
        self.model, self.held_out, self.batch_size = model, held_out, batch_size
        self.pairs, self.chats, self.labels = pairs, chats, labels
        self.journal = journal or Journal()
        self.precision: Precision = nullcontext

    @property
    def device(self) -> torch.device:
        """Where the model is now; a trainer moves it."""
        return next(self.model.parameters()).device

    @contextmanager
    def evaluating(self, precision: Precision | None = None, journal: Journal | None = None) -> Iterator[Predictor]:
        """Evaluation mode and no gradients inside; afterwards all is as it was.

        Args:
            precision: makes the context that the model runs in: a trainer's
                `precision_plugin.forward_context`.
                None: as before.
            journal: where tasks keep answers and pictures meanwhile. None: as before.
        """
        modes = {module: module.training for module in self.model.modules()}
        before = self.precision, self.journal
        self.precision, self.journal = precision or self.precision, journal or self.journal
        self.model.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            for module, training in modes.items():
                module.training = training
            self.precision, self.journal = before

    # --- contrastive ----------------------------------------------------------------------------

    @in_precision
    def embed_images(self, images: Pictures, mode: str) -> Tensor:
        """N pictures (H, W, 3) uint8 -> (N, E), or (N, Q, E) with an embedding a query, normalised,
        float32."""
        found = [embed_pictures(self.model, self.pairs, part, mode) for part in self._parts(images)]
        return normalised([check_finite(part, "embeddings of pictures") for part in found])

    @in_precision
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions -> (N, E), or (N, Q, E) with a vector a token, normalised, float32."""
        found = [embed_texts(self.model, self.pairs, part) for part in self._parts(texts)]
        return normalised([check_finite(part, "embeddings of texts") for part in found])

    @in_precision
    def match(self, images: Pictures, texts: Sequence[str]) -> Tensor:
        """Probability that each text belongs to its image: (N,)."""
        scores = []
        for pixels, part in zip(self._pixels(images), self._parts(texts), strict=True):
            scores.append(self.model.match(pixels, *self._text_batch("itm", part)).float().softmax(dim=-1)[:, 1])
        return check_finite(torch.cat(scores), "matches")

    @in_precision
    def classify(self, images: Pictures) -> Tensor:
        """Scores of a probe for N pictures (H, W, 3) uint8: (N, classes)."""
        parts = (self.placed(self.labels.pixels(part, ["held-out"] * len(part))) for part in self._parts(images))
        return check_finite(torch.cat([self.model.visual_tokens(pixels).float() for pixels in parts]), "scores of pictures")

    # --- language -------------------------------------------------------------------------------

    @in_precision
    def caption(self, images: Pictures, language: str = "en", max_new_tokens: int = 24, **search: Any) -> list[str]:
        """Captions written by the middleware; `search` goes to its `generate`."""
        tokenizer = self.pairs.tokenizer
        texts: list[str] = []
        prompt = torch.tensor(self.pairs.prompt_ids(self.pairs.caption_prompts[language]), device=self.device)
        for pixels in self._pixels(images):
            ids = self.model.middleware.generate(
                self.model.encoder(pixels, layers=self.model.middleware.layers[:1])[0],
                prompt.expand(len(pixels), -1),
                max_new_tokens=max_new_tokens,
                eos_id=tokenizer.eos_token_id,
                **search,
            )
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def answer(self, images: Pictures, questions: Sequence[str], max_new_tokens: int = 16, **search: Any) -> list[str]:
        """Answers written by the decoder, greedily, one question an image; `search` goes to its
        `generate`."""
        asked = [as_sample([image], question, question) for image, question in zip(images, questions, strict=True)]
        return self.complete(asked, max_new_tokens, **search)

    @in_precision
    def complete(self, samples: Sequence[dict[str, Any]], max_new_tokens: int = 16, **search: Any) -> list[str]:
        """Answers to conversations that end with a question, samples as `ChatCollator.prompts`
        takes them."""
        chats = self.chats
        texts: list[str] = []
        options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "logits_processor": LogitsProcessorList([FiniteLogits()]),
            "pad_token_id": chats.tokenizer.pad_token_id,
            **chats.stop_options(),
            **search,
        }
        size = max(1, self.batch_size // chats.processor.max_tiles)
        for part in self._parts(samples, size):
            batch = chats.prompts(part)
            inputs = {name: self.placed(tensor) for name, tensor in batch.items()}
            texts += chats.decoded(self.model.generate(**inputs, **options))
        return [chats.said(text, sample) for text, sample in zip(texts, samples, strict=True)]

    def placed(self, tensor: Tensor) -> Tensor:
        """A tensor where the model is; floats in the type of the tower's first weights."""
        return on_device(self.model, tensor)

    # --- batches --------------------------------------------------------------------------------

    def _parts(self, items: Sequence[Any] | np.ndarray, size: int | None = None) -> Iterator[Any]:
        size = size or self.batch_size
        return (items[i : i + size] for i in range(0, len(items), size))

    def _pixels(self, images: Pictures) -> Iterator[Tensor]:
        """The pictures as the middleware that reads text sees them, one square each."""
        return (self.placed(self.pairs.pixels(part, ["held-out"] * len(part))) for part in self._parts(images))

    def _text_batch(self, task: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = pad_rows(*self.pairs.rows(task, texts))
        return ids.to(self.device), mask.to(self.device)


def context_length(model: VLM) -> int | None:
    """Tokens that the language model reads and writes in all; None where it does not say."""
    config = getattr(getattr(model.decoder, "lm", None), "config", None)
    return getattr(config, "max_position_embeddings", None)


def with_full_context(chats: ChatCollator, model: VLM) -> ChatCollator:
    """A collator whose questions may be as long as the model reads, whatever training had."""
    chats = copy.copy(chats)
    chats.max_length = max(chats.max_length, (context_length(model) or 0) - 1)
    return chats


def as_sample(pictures: Sequence[np.ndarray], question: str, key: str) -> dict[str, Any]:
    """A question about pictures (H, W, 3) uint8, as `complete` takes it. Where the question does
    not say where each of them stands they come first."""
    marks = [] if question.count(IMAGE) == len(pictures) else [IMAGE] * len(pictures)
    return {"images": list(pictures), "conversation": [message_of("user", [*marks, question])], "key": key}
