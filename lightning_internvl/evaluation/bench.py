"""A model in use: embeddings, captions and answers in batches, as the evaluation tasks and the sample pictures need them.

Letters: N images, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.data.collate import ChatCollator, PairCollator, pad_rows, to_pixels
from lightning_internvl.data.encode import encode_prompt, token_id
from lightning_internvl.data.held_out import HeldOutScenes
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.middleware.qllama import Stream
from lightning_internvl.model import VLM


class Bench:
    """A model with its collators and the held-out data.

    Args:
        pairs: how texts are prepared for a middleware that reads them; None without one.
        chats: how conversations are prepared for the decoder; None without one.
    """

    def __init__(
        self,
        model: VLM,
        held_out: HeldOutScenes,
        *,
        pairs: PairCollator | None = None,
        chats: ChatCollator | None = None,
        batch_size: int = 125,
    ) -> None:
        self.model, self.held_out, self.pairs, self.chats, self.batch_size = model, held_out, pairs, chats, batch_size

    @property
    def device(self) -> torch.device:
        """Where the model is now; a trainer moves it."""
        return next(self.model.parameters()).device

    @contextmanager
    def evaluating(self) -> Iterator[Bench]:
        """Evaluation mode and no gradients inside; afterwards every module is in the mode it was in."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            for module, training in modes.items():
                module.training = training

    # --- contrastive ------------------------------------------------------------------------------------------------

    def embed_images(self, images: np.ndarray, mode: str) -> Tensor:
        """(N, S, S, 3) uint8 -> (N, E), normalised."""
        return torch.cat([F.normalize(self.model.encode_image(p, mode), dim=-1) for p in self._pixels(images)])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions -> (N, E), normalised."""
        rows = [self._text_batch("itc", part) for part in self._parts(texts)]
        return torch.cat([F.normalize(self.model.encode_text(ids, mask), dim=-1) for ids, mask in rows])

    def match(self, images: np.ndarray, texts: Sequence[str]) -> Tensor:
        """Probability that each text belongs to its image: (N,)."""
        scores = []
        for pixels, part in zip(self._pixels(images), self._parts(texts), strict=True):
            visual = self.model.encoder(pixels)[0]
            ((queries, _),) = self.model.middleware.read(visual, [Stream("itm", *self._text_batch("itm", part))])
            scores.append(self.model.objectives["itm"].logits(queries).softmax(dim=-1)[:, 1])
        return torch.cat(scores)

    # --- language ---------------------------------------------------------------------------------------------------

    def caption(self, images: np.ndarray, language: str = "en", max_new_tokens: int = 24) -> list[str]:
        """Captions written by the middleware."""
        tokenizer, texts = self.pairs.tokenizer, []
        prompt = torch.tensor(self.pairs.prompt_ids(self.pairs.caption_prompts[language]), device=self.device)
        for pixels in self._pixels(images):
            ids = self.model.middleware.generate(
                self.model.encoder(pixels)[0],
                prompt.expand(len(pixels), -1),
                max_new_tokens=max_new_tokens,
                eos_id=tokenizer.eos_token_id,
            )
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def answer(self, images: np.ndarray, questions: Sequence[str], max_new_tokens: int = 16) -> list[str]:
        """Answers written by the decoder, greedily, one question an image."""
        chats, tokenizer, texts = self.chats, self.chats.tokenizer, []
        end = token_id(tokenizer, chats.template.end(tokenizer.eos_token))
        for pixels, part in zip(self._pixels(images), self._parts(questions), strict=True):
            prompts = [self._prompt(question) for question in part]
            # Padding goes to the left, so that all rows end where the answer begins.
            ids, mask = (t.flip(1).to(self.device) for t in pad_rows([row[::-1] for row in prompts], tokenizer.pad_token_id))
            options = {
                "max_new_tokens": max_new_tokens,
                "do_sample": False,
                "eos_token_id": end,
                "pad_token_id": tokenizer.pad_token_id,
            }
            new = self.model.generate(pixel_values=pixels, input_ids=ids, attention_mask=mask, **options)
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    # --- batches ----------------------------------------------------------------------------------------------------

    def _parts(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        return (items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size))

    def _pixels(self, images: np.ndarray) -> Iterator[Tensor]:
        return (to_pixels(part).to(self.device) for part in self._parts(images))

    def _text_batch(self, task: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = pad_rows(*self.pairs.rows(task, texts))
        return ids.to(self.device), mask.to(self.device)

    def _prompt(self, question: str) -> list[int]:
        turns = [{"role": "user", "content": f"{IMAGE}\n{question}"}]
        chats = self.chats
        return encode_prompt(
            turns, chats.template, chats.tokenizer, chats.visual_tokens, chats.max_length, question, chats.image_tokens
        )
