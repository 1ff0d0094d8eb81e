"""Built-in sequences of pictures: with questions about each, or as the frames of a video."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.datasets import SceneChats
from lightning_internvl.data.templates import VIDEO, message_of

FPS = 2.0


class SceneAlbums(SceneChats):
    """{"images": [(S, S, 3) uint8, ...], "conversation": [messages], "key"}: `pictures` scenes,
    `turns` questions about each.

    "<image>" stands before the first question about a picture, so that pictures and text alternate.
    The other arguments are those of `SceneChats`; the last question about each picture may ask for
    a caption or a layout.
    """

    def __init__(self, *args: Any, pictures: int = 3, **options: Any) -> None:
        if pictures < 1:
            raise ValueError(f"an album needs a picture or more, not {pictures=}")
        super().__init__(*args, **options)
        self.pictures = pictures

    def __getitem__(self, position: int) -> dict[str, Any]:
        shown = [(position * self.pictures + i) % self.length for i in range(self.pictures)]
        parts = [super(SceneAlbums, self).__getitem__(place) for place in shown]
        return {
            "images": [image for part in parts for image in part["images"]],
            "conversation": [message for part in parts for message in part["conversation"]],
            "key": self.key(position),
        }


class SceneVideos(SceneChats):
    """{"images": [], "videos": [((F, S, S, 3) uint8, 2.0)], "conversation", "key"}: `scenes`
    scenes, a second each, to be described one after the other.

    The answer is all captions in the order of the scenes. The other arguments are those of
    `SceneChats`.
    """

    def __init__(self, *args: Any, scenes: int = 2, **options: Any) -> None:
        if scenes < 1:
            raise ValueError(f"a video needs a scene or more, not {scenes=}")
        super().__init__(*args, **options)
        self.shown = scenes

    def __getitem__(self, position: int) -> dict[str, Any]:
        rng = self.rng(position)
        scenes = [self.scene((position * self.shown + i) % self.length) for i in range(self.shown)]
        frames = [self.scenes.render(scene) for scene in scenes for _ in range(int(FPS))]
        conversation = [
            message_of("user", [VIDEO, say.CAPTION_REQUEST]),
            {"role": "assistant", "content": ", ".join(say.caption(scene, rng) for scene in scenes)},
        ]
        return {"images": [], "videos": [(np.stack(frames), FPS)], "conversation": conversation, "key": self.key(position)}
