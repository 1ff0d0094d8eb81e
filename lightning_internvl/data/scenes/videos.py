"""Short videos of scenes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_internvl.data.files.lazy_pictures import LazyPictures
from lightning_internvl.data.files.video_lists import STREAM, LabelledVideos
from lightning_internvl.data.scenes.generator import COLOUR_JITTER, SIZE_RANGE, Placed, Scene, Scenes
from lightning_internvl.data.scenes.things import COLOURS, THINGS


def scene_videos(seed: int, image_size: int, styles: Sequence[str], count: int, frames: int = 16) -> LabelledVideos:
    """Videos of one thing that visits the four quarters of the picture in a random order and drifts
    about in each; the things take turns. They depend on `seed` alone."""
    scenes = Scenes(seed, "single", image_size, tuple(styles))
    videos = LazyPictures(range(count), lambda place: _render_video(scenes, place, frames))
    labels = [place % len(THINGS) for place in range(count)]
    return LabelledVideos(videos, labels, [thing.name for thing in THINGS], count)


def _render_video(scenes: Scenes, place: int, frames: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([scenes.seed, STREAM, place])))
    background, half = int(rng.integers(len(COLOURS))), scenes.image_size // 2
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    red, green, blue = (min(int(value + by), 255) for value, by in zip(COLOURS[background].rgb, jitter, strict=True))
    style, shown = scenes.styles[place // len(THINGS) % len(scenes.styles)], []
    for cell, moments in zip(rng.permutation(4).tolist(), np.array_split(np.arange(frames), 4), strict=True):
        size = round(half * rng.uniform(*SIZE_RANGE))
        start, end = rng.random(2), rng.random(2)
        for moment in np.linspace(0, 1, len(moments)):
            x, y = (int(at * (half - size + 1)) for at in start + (end - start) * moment)
            x, y = x + half * (cell % 2), y + half * (cell // 2)
            box = tuple(value / scenes.image_size for value in (x, y, x + size, y + size))
            shown.append(scenes.render(Scene(background, (red, green, blue), (Placed(place % len(THINGS), style, cell, box),))))
    return np.stack(shown)
