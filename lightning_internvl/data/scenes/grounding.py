"""Two more kinds of conversation from scenes: where things are, and text alone."""

from __future__ import annotations

from typing import Any

from lightning_internvl.data.grounding import grounded_text
from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.datasets import _SceneDataset
from lightning_internvl.data.scenes.generator import Scene
from lightning_internvl.data.scenes.things import THINGS
from lightning_internvl.data.templates import IMAGE, Message, message_of

# So that texts are drawn independently of scenes and of each other
GROUNDING_STREAM, TEXT_STREAM = 3, 4


class _SceneTalk(_SceneDataset):
    def __init__(
        self,
        seed: int,
        split: str,
        image_size: int = 64,
        styles: tuple[str, ...] = ("twemoji", "openmoji"),
        length: int | None = None,
    ) -> None:
        super().__init__(seed, split, image_size, styles, length, unique=False)


class SceneGrounding(_SceneTalk):
    """{"images": [(S, S, 3) uint8], "conversation": [messages], "key"}: three turns about places in
    one scene.

    A phrase is asked for its boxes, a box for its phrase, and the picture for a description with
    all boxes, as in the multi-task stage of Qwen-VL. Box numbers are multiples of
    `language.BOX_STEP`.
    """

    stream = GROUNDING_STREAM

    def __getitem__(self, position: int) -> dict[str, Any]:
        scene, rng = self.scene(position), self.rng(position)
        kinds = list(scene.counts)
        asked = kinds[int(rng.integers(len(kinds)))]
        shown = scene.objects[int(rng.integers(len(scene.objects)))]
        one = scene.counts[asked] == 1
        phrase = f"the {THINGS[asked].name if one else THINGS[asked].plural}"
        turns = [
            (f"where {'is' if one else 'are'} {phrase}?", _grounded(scene, asked, phrase)),
            (f"what is in {say.box_text(shown.box)}?", say.noun_phrase(THINGS[shown.thing], 1)),
            (say.CAPTION_REQUEST, ", ".join(_grounded(scene, i, say.noun_phrase(THINGS[i], scene.counts[i])) for i in kinds)),
        ]
        return {"images": [self.scenes.render(scene)], "conversation": _messages(turns, shown=True), "key": self.key(position)}


class SceneTexts(_SceneTalk):
    """{"images": [], "conversation": [messages], "key"}: captions to be put into the other
    language. No pictures are drawn."""

    stream = TEXT_STREAM

    def __getitem__(self, position: int) -> dict[str, Any]:
        scene, rng = self.scene(position), self.rng(position)
        languages = say.LANGUAGES if rng.random() < 0.5 else say.LANGUAGES[::-1]
        asked, answer = (say.references(scene, language)[0] for language in languages)
        return {"images": [], "conversation": _messages([(asked, answer)]), "key": self.key(position)}


def _grounded(scene: Scene, thing: int, phrase: str) -> str:
    return grounded_text(phrase, [placed.box for placed in scene.objects if placed.thing == thing], say.BOX_STEP)


def _messages(turns: list[tuple[str, str]], shown: bool = False) -> list[Message]:
    """Questions and answers; the first question is asked about a picture, if one is `shown`."""
    said = [pair for turn in turns for pair in zip(("user", "assistant"), turn, strict=True)]
    return [message_of(role, [IMAGE, text] if shown and not place else [text]) for place, (role, text) in enumerate(said)]
