"""Pictures of the built-in scenes for the page of a model that was trained on them, drawn larger
than the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lightning_internvl.choices import Config
from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.generator import Scene, Scenes

SIDE = 480  # pixels
GALLERY = 24  # scenes to look through


class Example(NamedTuple):
    """A picture that training never showed, and a question about it."""

    path: Path
    question: str


def examples_of(held_out: Config, folder: Path) -> list[Example]:
    """A few pictures with questions of different kinds.

    Args:
        held_out: settings of the held-out scenes.
        folder: where the pictures are drawn.
    """
    source = _source(held_out)
    scenes = source.unique_scenes(GALLERY + 4)[GALLERY:]
    cell = say.CELLS[scenes[1].objects[0].cell]
    questions = [f"what is in the {cell}?", "what colour is the background?", say.CAPTION_REQUEST, say.LAYOUT_REQUEST]
    order = [scenes[1], scenes[0], scenes[2], scenes[3]]
    return [
        Example(_draw_scene(source, scene, folder / f"{i}.png"), q)
        for i, (scene, q) in enumerate(zip(order, questions, strict=True))
    ]


def draw_scenes(held_out: Config, folder: Path) -> Path:
    """A folder of pictures to look through."""
    source = _source(held_out)
    for number, scene in enumerate(source.unique_scenes(GALLERY)):
        _draw_scene(source, scene, folder / f"{number:02d}.png")
    return folder


def _source(held_out: Config) -> Scenes:
    styles = held_out.get("styles") or ("twemoji", "openmoji")
    return Scenes(held_out["seed"], "scenes", SIDE, tuple(styles))


def _draw_scene(source: Scenes, scene: Scene, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(source.render(scene)).save(path)
    return path
