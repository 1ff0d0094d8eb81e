"""Built-in sequences of several pictures: each is shown, asked about, and followed by the next one."""

from __future__ import annotations

from typing import Any

from lightning_internvl.data.scene_datasets import SceneChats


class SceneAlbums(SceneChats):
    """{"images": [(S, S, 3) uint8, ...], "conversation": [messages], "key"}: `pictures` scenes, `turns` questions about each.

    "<image>" stands before the first question about a picture, so that pictures and text alternate. The other arguments are those
    of `SceneChats`; the last question about each picture may ask for a caption or a layout.
    """

    def __init__(self, *args: Any, pictures: int = 3, **options: Any) -> None:
        if pictures < 1:
            raise ValueError(f"an album needs a picture or more, not {pictures=}")
        super().__init__(*args, **options)
        self.pictures = pictures

    def __getitem__(self, position: int) -> dict[str, Any]:
        shown = [(position * self.pictures + number) % self.length for number in range(self.pictures)]
        parts = [super(SceneAlbums, self).__getitem__(place) for place in shown]
        return {
            "images": [image for part in parts for image in part["images"]],
            "conversation": [message for part in parts for message in part["conversation"]],
            "key": self.key(position),
        }
