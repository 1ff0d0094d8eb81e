"""Videos with a class each: lists as of Kinetics, and short ones of built-in things that move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_internvl.data.files.lazy_pictures import LazyPictures, evenly_spread
from lightning_internvl.data.files.table_rows import read_table
from lightning_internvl.data.files.videos import read_video

STREAM = 5  # apart from those of scenes and of what is said about them


@dataclass(frozen=True)
class LabelledVideos:
    """`videos` (F, H, W, 3) uint8, the class of each, the classes' names, the videos in all."""

    videos: LazyPictures
    labels: list[int]
    names: list[str]
    total: int


def read_video_list(
    path: str | Path, videos: str | Path | None = None, names: str | Path | None = None, samples: int | None = None
) -> LabelledVideos:
    """A table with columns `path` and `label`, or, without that line, of path and label.

    Args:
        path: columns are set apart by commas, or by blanks as in the lists of VideoMAE.
        videos: the folder where the paths start; None: that of the list. What a path names is what
            `read_video` reads.
        names: a text with the name of a class a line; labels are then names or numbers from 0 on.
            None: the labels are the names, and classes are numbered in their order.
        samples: only that many videos, spread over the list.

    Raises:
        ValueError: naming file and line, for a line without path or label, a label that is no
            class, and a first video that is not there.
    """
    path, root = Path(path), Path(videos) if videos else Path(path).parent
    rows = _read_rows(path)
    classes = _read_lines(Path(names)) if names else sorted({label for _, _, label in rows})
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
    places = evenly_spread(len(rows), samples)
    if not (root / rows[places[0]][1]).exists():
        video, advice = rows[places[0]][1], "say where videos are with videos=FOLDER"
        raise ValueError(f"{path}: the video {video} is not in {root}; {advice}")
    files = [root / rows[place][1] for place in places]
    chosen = LazyPictures(files, lambda file: read_video(file)[0])
    spoken = [name.replace("_", " ") for name in classes]
    return LabelledVideos(chosen, [labels[place] for place in places], spoken, len(rows))


def _read_rows(path: Path) -> list[tuple[int, str, str]]:
    """Number of the line, path and label."""
    lines = _read_lines(path)
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


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    if not lines:
        raise ValueError(f"{path} is empty")
    return [line.strip() for line in lines]
