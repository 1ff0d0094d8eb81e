"""Videos with a class each: lists as of Kinetics, and short ones of built-in things that move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_internvl.data.pictures import Pictures, spread
from lightning_internvl.data.scenes import COLOUR_JITTER, SIZE_RANGE, Placed, Scene, Scenes
from lightning_internvl.data.table_rows import read_table
from lightning_internvl.data.things import COLOURS, THINGS
from lightning_internvl.data.video_files import read_video

STREAM = 5  # apart from those of scenes and of what is said about them


@dataclass(frozen=True)
class LabelledVideos:
    """`videos` (F, H, W, 3) uint8, the class of each, the names of the classes, and how many videos there are in all."""

    videos: Pictures
    labels: list[int]
    names: list[str]
    total: int


def scene_videos(seed: int, image_size: int, styles: Sequence[str], count: int, frames: int = 16) -> LabelledVideos:
    """Videos of one thing that visits the four quarters of the picture in a random order and drifts about in each; the things
    take turns. They depend on `seed` alone."""
    scenes = Scenes(seed, "single", image_size, tuple(styles))
    videos = Pictures(range(count), lambda place: _visiting(scenes, place, frames))
    return LabelledVideos(videos, [place % len(THINGS) for place in range(count)], [thing.name for thing in THINGS], count)


def _visiting(scenes: Scenes, place: int, frames: int) -> np.ndarray:
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


def read_video_list(
    path: str | Path, videos: str | Path | None = None, names: str | Path | None = None, samples: int | None = None
) -> LabelledVideos:
    """A table with a column `path` and a column `label`, or without such a first line: the path, then the label.

    Args:
        path: columns are set apart by commas, or by blanks as in the lists of VideoMAE.
        videos: the folder where the paths start; None: that of the list. What a path names is what `read_video` reads.
        names: a text with the name of a class a line; labels are then names or numbers from 0 on. None: the labels are the
            names, and classes are numbered in their order.
        samples: only that many videos, spread over the list.

    Raises:
        ValueError: naming file and line, for a line without path or label, a label that is no class, and a first video that is
            not there.
    """
    path, root = Path(path), Path(videos) if videos else Path(path).parent
    rows = _rows(path)
    classes = _lines(Path(names)) if names else sorted({label for _, _, label in rows})
    known = {name: number for number, name in enumerate(classes)}
    if names:
        known = {str(number): number for number in range(len(classes))} | known
    labels = []
    for line, _, label in rows:
        if label not in known:
            raise ValueError(f"{path}: line {line}: {label!r} is no class of {names}")
        labels.append(known[label])
    if len(classes) < 2:
        raise ValueError(f"{path} lists one class; classes are told apart from two on")
    places = spread(len(rows), samples)
    if not (root / rows[places[0]][1]).exists():
        raise ValueError(f"{path}: the video {rows[places[0]][1]} is not in {root}; say where videos are with videos=FOLDER")
    chosen = Pictures([root / rows[place][1] for place in places], lambda file: read_video(file)[0])
    return LabelledVideos(chosen, [labels[place] for place in places], [name.replace("_", " ") for name in classes], len(rows))


def _rows(path: Path) -> list[tuple[int, str, str]]:
    """Number of the line, path and label."""
    lines = _lines(path)
    if "," in lines[0]:
        table = list(read_table(path, (",",)))
    else:
        table = [(number, line.rsplit(maxsplit=1)) for number, line in enumerate(lines, start=1)]
    first, fields = table[0][1], (0, 1)
    headed = "path" in first and "label" in first
    if headed:
        fields = first.index("path"), first.index("label")
    found = []
    for number, row in table[headed:]:
        if len(row) <= max(fields) or not all(row[field].strip() for field in fields):
            raise ValueError(f"{path}: line {number} lacks a path or a label: {','.join(row)!r}")
        found.append((number, row[fields[0]].strip(), row[fields[1]].strip()))
    if not found:
        raise ValueError(f"{path} lists no video")
    return found


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    if not lines:
        raise ValueError(f"{path} is empty")
    return [line.strip() for line in lines]


def evenly(frames: int, wanted: int) -> list[int]:
    """The middles of as many equal parts: of one part the middle frame; a short video gives some frames twice."""
    return [int((part + 0.5) * frames / wanted) for part in range(wanted)]
