"""An article with pictures: the model says where they belong and what they show, a folder is
searched, the model chooses.

The five steps of InternLM-XComposer (Zhang et al. 2023, section 3.3; official `gradio_demo`), with
pictures from a folder instead of a service. Whatever a small model answers, each step ends: where
an answer cannot be read, the similarities decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.files.images import read_image
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.inference.picture_search import Gallery, SearchHit
from lightning_internvl.inference.predictor import with_full_context
from lightning_internvl.model.vlm import VLM

LETTERS = "ABCDEFGH"
WRITE = "Write an article with pictures and without repetitions for this title: {title}"
SPOT = 'Given the article "{article}" choose {count} lines after which a picture belongs.'
CAPTION = 'Given the article "{article}" give the caption of a picture that belongs after <Seg{place}>.'
CHOOSE = 'Given the article "{article}" choose the picture that belongs after <Seg{place}>: {candidates}. Answer with one letter.'


class Author:
    """A model that answers requests, with pictures or without.

    Args:
        chats: how the model reads conversations.
        options: of `generate`, in place of the defaults (greedy search).
    """

    def __init__(self, model: VLM, chats: ChatCollator, **options: Any) -> None:
        self.model, self.options = model.eval(), options
        self.chats = with_full_context(chats, model)

    @torch.no_grad()
    def ask(self, request: str, images: Sequence[np.ndarray] = (), max_new_tokens: int = 100) -> str:
        """The answer; "<image>" in the request stands for each picture (H, W, 3) uint8.

        Raises:
            ValueError: for a request that is longer than the model reads.
        """
        turns = [{"role": "user", "content": request}]
        sample = {"images": list(images), "conversation": turns, "key": request[:40]}
        batch = self.chats.prompts([sample])
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": self.chats.tokenizer.pad_token_id}
        new = self.model.generate(**batch, **(options | self.chats.stop_options() | self.options))
        return self.chats.decoded(new)[0]


@dataclass(frozen=True)
class PlacedPicture:
    """A picture of an article: after which paragraph (from 0), what was looked for, what was found,
    which one was taken."""

    after: int
    caption: str
    candidates: list[SearchHit]
    path: Path


@dataclass(frozen=True)
class Article:
    """Paragraphs and the pictures between them."""

    paragraphs: list[str]
    pictures: list[PlacedPicture]

    def markdown(self) -> str:
        """The article as Markdown."""
        lines = []
        for place, paragraph in enumerate(self.paragraphs):
            lines.append(paragraph)
            lines += [f"![{p.caption}]({p.path.as_posix()})" for p in self.pictures if p.after == place]
        return "\n\n".join(lines) + "\n"


def illustrate(
    author: Author, gallery: Gallery, *, text: str | None = None, title: str | None = None, pictures: int = 1, candidates: int = 4
) -> Article:
    """Put pictures of a gallery into an article.

    Args:
        text: the article, a paragraph a line; without it, one is written for `title`.
        pictures: how many pictures are wanted.
        candidates: pictures that the author chooses from.

    Raises:
        ValueError: unless there is either a text or a title, with a word in it, and for numbers out
            of range.
    """
    if (text is None) == (title is None):
        raise ValueError("an article is made of a text or of a title, one of the two")
    if pictures < 0 or not 1 <= candidates <= len(LETTERS):
        raise ValueError(f"{pictures=} must be 0 or more and {candidates=} from 1 to {len(LETTERS)}")
    if text is None:
        text = author.ask(WRITE.format(title=title), max_new_tokens=500)
    paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
    if not paragraphs:
        raise ValueError("the article is empty")
    placed: list[PlacedPicture] = []
    for place in picture_places(author, gallery, paragraphs, min(pictures, len(paragraphs))):
        caption = _caption(author, paragraphs, place)
        (found,) = gallery.search([caption], candidates + len(placed))
        taken = {p.path for p in placed}  # no picture twice, while there are others
        found = ([f for f in found if f.path not in taken] or found)[:candidates]
        placed.append(PlacedPicture(place, caption, found, _choose(author, paragraphs, place, found)))
    return Article(paragraphs, placed)


def picture_places(author: Author, gallery: Gallery, paragraphs: Sequence[str], count: int) -> list[int]:
    """Paragraphs (from 0) after which pictures belong: those that the author names, then those that
    some picture fits best."""
    if count == 0:
        return []
    answer = author.ask(SPOT.format(article=_with_numbers(paragraphs), count=count), max_new_tokens=300)
    named = re.findall(r"<?Seg\s*(\d+)", answer) or re.findall(r"\d+", answer)
    numbers = dict.fromkeys(map(int, named))
    places = [number - 1 for number in numbers if 1 <= number <= len(paragraphs)][:count]
    if len(places) < count:
        fits = [found[0].similarity for found in gallery.search(list(paragraphs), 1)]
        left = [place for place in range(len(paragraphs)) if place not in places]
        places += sorted(left, key=lambda place: -fits[place])[: count - len(places)]
    return sorted(places)


def _with_numbers(paragraphs: Sequence[str]) -> str:
    return "\n".join(f"<Seg{i}> {text}" for i, text in enumerate(paragraphs, start=1))


def _caption(author: Author, paragraphs: Sequence[str], place: int) -> str:
    """What the picture after a paragraph shows, by what stands before it; the paragraph itself
    where the author says nothing."""
    answer = author.ask(CAPTION.format(article=_with_numbers(paragraphs[: place + 2]), place=place + 1))
    return answer.strip(' "\n') or paragraphs[place]


def _choose(author: Author, paragraphs: Sequence[str], place: int, found: Sequence[SearchHit]) -> Path:
    """The picture whose letter the author answers; the nearest for another answer."""
    if len(found) == 1:
        return found[0].path
    listed = ", ".join(f"{letter} {IMAGE}" for letter, _ in zip(LETTERS, found, strict=False))
    request = CHOOSE.format(article=_with_numbers(paragraphs[: place + 1]), place=place + 1, candidates=listed)
    answer = author.ask(request, [read_image(f.path) for f in found], max_new_tokens=10)
    letter = re.search(rf"\b([{LETTERS[: len(found)]}])\b", answer)
    return found[LETTERS.index(letter[1]) if letter else 0].path
