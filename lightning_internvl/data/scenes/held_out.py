"""The held-out side of the built-in scenes, ready for the evaluation tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_internvl.data.files.labelled_folder import LabelledImages
from lightning_internvl.data.files.lazy_pictures import Pictures
from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.datasets import SceneChats
from lightning_internvl.data.scenes.generator import Scenes
from lightning_internvl.data.scenes.things import THINGS


@dataclass(frozen=True)
class CaptionedImages:
    """`images` (H, W, 3) uint8, one caption each that fits no other image, and all accepted
    wordings."""

    images: Pictures
    captions: list[str]
    references: list[list[str]]
    language: str = "en"


@dataclass(frozen=True)
class AskedImages:
    """`images` (N, S, S, 3) uint8 and one question each; `boxes` holds the true box (0..1) where
    the answer is one."""

    images: np.ndarray
    turns: list[say.Turn] = field(default_factory=list)


class HeldOutScenes:
    """Scenes, combinations and single things that no training step has seen.

    Args:
        seed: the seed of the data; training and held-out scenes come from different streams of it.
        scenes: size of the retrieval sets.
        questions: how many questions are asked.
        single: how many pictures of single things are classified.
    """

    def __init__(
        self,
        *,
        seed: int,
        image_size: int,
        styles: Sequence[str] = ("twemoji", "openmoji"),
        scenes: int = 500,
        questions: int = 500,
        single: int = 288,
    ) -> None:
        if scenes < 10 or min(questions, single) < 1:
            least = "10 scenes (for recall at 10), a question and a single"
            raise ValueError(f"held-out data needs {least}: {scenes=}, {questions=}, {single=}")
        self.seed, self.image_size, self.styles = seed, image_size, tuple(styles)
        self.scenes, self.asked, self.single = scenes, questions, single

    def identity(self) -> None:
        """Its settings say all."""

    def captioned(self, split: str = "scenes", language: str = "en") -> CaptionedImages:
        """Pictures whose captions all differ ("scenes": new scenes; "combinations": pairs of things
        never seen together)."""
        source = Scenes(self.seed, split, self.image_size, self.styles)
        scenes = source.unique_scenes(self.scenes)
        references = [say.references(scene, language) for scene in scenes]
        images = np.stack([source.render(scene) for scene in scenes])
        return CaptionedImages(images, [texts[0] for texts in references], references, language)

    def labelled(self, language: str = "en") -> LabelledImages:
        """One thing alone, to be named among all; training shows two objects or more."""
        source = Scenes(self.seed, "single", self.image_size, self.styles)
        images = np.stack([source.render(source.scene(i)) for i in range(self.single)])
        prompts = [say.class_prompts(thing, language) for thing in THINGS]
        return LabelledImages(images, [i % len(THINGS) for i in range(self.single)], prompts)

    def questioned(self, split: str = "scenes") -> AskedImages:
        """One question for each picture."""
        options: dict[str, Any] = {"turns": 1, "caption_share": 0.0, "length": self.asked, "unique": True}
        chats = SceneChats(self.seed, split, self.image_size, styles=self.styles, **options)
        images = np.stack([chats.scenes.render(chats.scene(i)) for i in range(self.asked)])
        return AskedImages(images, [chats.questions(i)[0] for i in range(self.asked)])
