"""Map-style datasets of scenes: image-caption pairs, and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.generator import SPLITS, Scene, Scenes
from lightning_internvl.data.templates import IMAGE, Message, message_of

ENDLESS = 2**40
# So that texts are drawn independently of scenes and of each other
PAIRS_STREAM, CHATS_STREAM = 1, 2


class _SceneDataset(Dataset[dict[str, Any]]):
    """Scenes by position. `length` None is endless; with `unique`, the first `length` scenes of
    different content."""

    stream: int

    def __init__(self, seed: int, split: str, image_size: int, styles: tuple[str, ...], length: int | None, unique: bool) -> None:
        if unique and length is None:
            raise ValueError("unique scenes need a length")
        self.scenes = Scenes(seed, split, image_size, tuple(styles))
        self.length = ENDLESS if length is None else length
        self.indices = self.scenes.unique_indices(self.length) if unique else None

    def __len__(self) -> int:
        return self.length

    def identity(self) -> None:
        """Its settings say all."""

    def scene(self, position: int) -> Scene:
        """The scene of a sample."""
        return self.scenes.scene(self.scene_index(position))

    def scene_index(self, position: int) -> int:
        """The scene's number in its split. Raises IndexError beyond the length."""
        if not 0 <= position < self.length:
            raise IndexError(f"sample {position} of {self.length}")
        return position if self.indices is None else self.indices[position]

    def key(self, position: int) -> str:
        """The sample's name, split/number."""
        return f"{self.scenes.split}/{self.scene_index(position)}"

    def rng(self, position: int) -> np.random.Generator:
        """The source of what is said about a sample."""
        entropy = [self.scenes.seed, SPLITS.index(self.scenes.split), self.scene_index(position), self.stream]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


class ScenePairs(_SceneDataset):
    """{"image": (S, S, 3) uint8, "caption", "language", "key"}; `languages` maps each language to
    its share."""

    stream = PAIRS_STREAM

    def __init__(
        self,
        seed: int,
        split: str,
        image_size: int = 64,
        languages: Mapping[str, float] | None = None,
        styles: tuple[str, ...] = ("twemoji", "openmoji"),
        length: int | None = None,
        unique: bool = False,
    ) -> None:
        super().__init__(seed, split, image_size, styles, length, unique)
        shares = dict(languages or {"en": 0.75, "zh": 0.25})
        if not set(shares) <= set(say.LANGUAGES) or min(shares.values()) < 0 or sum(shares.values()) <= 0:
            raise ValueError(f"languages must give shares of {list(say.LANGUAGES)}, got {shares}")
        self.languages = shares

    def __getitem__(self, position: int) -> dict[str, Any]:
        scene, rng = self.scene(position), self.rng(position)
        language = say.draw(self.languages, rng)
        return {
            "image": self.scenes.render(scene),
            "caption": say.caption(scene, rng, language),
            "language": language,
            "key": self.key(position),
        }


class SceneChats(_SceneDataset):
    """{"images": [(S, S, 3) uint8], "conversation": [messages], "key"}: `turns` questions about one
    scene.

    `questions` gives the shares of their kinds; None: those of `language.QUESTION_SHARES`.
    `first` gives kinds that are practised alone before all others, and for how many samples.
    In a share `caption_share` of the conversations the last question asks for a caption, in a share
    `layout_share` for what each cell holds. Last, because an earlier description would answer the
    questions after it, and the picture need not be looked at. Of the others a share `place_share`
    asks one question more, where a thing is (see `language.with_place`).
    """

    stream = CHATS_STREAM

    def __init__(
        self,
        seed: int,
        split: str,
        image_size: int = 64,
        turns: int = 4,
        caption_share: float = 0.2,
        layout_share: float = 0.0,
        place_share: float = 0.0,
        styles: tuple[str, ...] = ("twemoji", "openmoji"),
        length: int | None = None,
        unique: bool = False,
        questions: Mapping[str, float] | None = None,
        first: Mapping[str, int] | None = None,
    ) -> None:
        if turns < 1:
            raise ValueError(f"turns must be 1 or more, got {turns}")
        self.shares = dict(questions or say.QUESTION_SHARES)
        self.first = dict(first or {})
        if min(self.first.values(), default=0) < 0:
            raise ValueError(f"first must give numbers of samples, got {self.first}")
        for shares in (self.shares, *({kind: 1.0} for kind in self.first)):
            say.check_shares(shares, turns)
        super().__init__(seed, split, image_size, styles, length, unique)
        if min(caption_share, layout_share) < 0 or caption_share + layout_share > 1:
            given = f"{caption_share=}, {layout_share=}"
            raise ValueError(f"shares must be 0 or more and at most 1 together: {given}")
        if not 0 <= place_share <= 1:
            raise ValueError(f"{place_share=} must lie from 0 to 1")
        self.turns, self.caption_share, self.layout_share, self.place_share = turns, caption_share, layout_share, place_share

    def __getitem__(self, position: int) -> dict[str, Any]:
        scene = self.scene(position)
        conversation: list[Message] = []
        for turn in self.questions(position):
            conversation.append(message_of("user", [turn.question] if conversation else [IMAGE, turn.question]))
            conversation.append({"role": "assistant", "content": turn.answer})
        return {"images": [self.scenes.render(scene)], "conversation": conversation, "key": self.key(position)}

    def questions(self, position: int) -> list[say.Turn]:
        """The turns of a conversation with their kinds and boxes; those that describe are of the
        kinds "caption" and "layout"."""
        scene, rng = self.scene(position), self.rng(position)
        until = 0
        for kind, samples in self.first.items():
            until += samples
            if position < until:
                return say.questions(scene, rng, self.turns, {kind: 1.0})
        turns = say.questions(scene, rng, self.turns, self.shares)
        draw = rng.random()
        if draw < self.caption_share:
            turns[-1] = say.Turn(say.CAPTION_REQUEST, say.caption(scene, rng), "caption")
        elif draw < self.caption_share + self.layout_share:
            turns[-1] = say.Turn(say.LAYOUT_REQUEST, say.layout(scene), "layout")
        elif self.place_share and rng.random() < self.place_share:
            return say.with_place(turns, scene, rng)
        return turns
