"""Questions about scenes with a true and a plausible wrong answer, of which the true one is preferred."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.datasets import SceneChats
from lightning_internvl.data.scenes.generator import Scene
from lightning_internvl.data.scenes.things import COLOURS, THINGS

WRONG_STREAM = 3  # beside those of pairs and chats


class ScenePreferences(SceneChats):
    """What `SceneChats` gives, and "rejected": a wrong answer to the last question. Answers before it
    are read and not learnt; none describes the whole scene.

    Args:
        settings: of `SceneChats`; there is one question a scene.
    """

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **{"turns": 1, "caption_share": 0.0, "layout_share": 0.0, **settings})
        if self.caption_share or self.layout_share:
            raise ValueError("a description has no plausible wrong answer here: caption_share and layout_share must be 0")
        if self.place_share:
            raise ValueError("the last question is the one of two answers: place_share must be 0")

    def __getitem__(self, position: int) -> dict[str, Any]:
        sample = super().__getitem__(position)
        for message in sample["conversation"][:-1]:
            if message["role"] == "assistant":
                message["learnt"] = False
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.scenes.seed, position, WRONG_STREAM])))
        return {**sample, "rejected": wrong_answer(self.questions(position)[-1], self.scene(position), rng)}


def wrong_answer(turn: say.Turn, scene: Scene, rng: np.random.Generator) -> str:
    """An answer of the right kind that is not true: the other of yes and no, another number, colour or
    box, and of things one that stands elsewhere in the scene, if there is one."""
    if turn.box is not None:
        x0, y0, x1, y1 = turn.box
        mirrored = [(1 - x1, y0, 1 - x0, y1), (x0, 1 - y1, x1, 1 - y0), (1 - x1, 1 - y1, 1 - x0, 1 - y0)]
        choices = [say.box_text(box) for box in mirrored]
    else:
        near = [THINGS[thing].name for thing in scene.counts if THINGS[thing].name != turn.answer]
        choices = {
            "exists": ["yes", "no"],
            "count": list(say.COUNTS["en"][1:]),
            "colour": [colour.name for colour in COLOURS],
            "what": near or [thing.name for thing in THINGS],
        }[turn.kind]
    wrong = [answer for answer in choices if answer != turn.answer]
    return wrong[int(rng.integers(len(wrong)))]
