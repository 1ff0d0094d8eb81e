"""Pictures with several captions each, in the files of COCO and Flickr30K."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_internvl.data.files.images import read_image
from lightning_internvl.data.files.lazy_pictures import LazyPictures, evenly_spread
from lightning_internvl.data.files.table_rows import read_table

Pair = tuple[str, str]  # a picture's file and one of its captions
PICTURE_COLUMNS = ("image", "image_name", "filename", "filepath", "file_name", "path")
CAPTION_COLUMNS = ("caption", "raw", "comment", "title", "text")


@dataclass(frozen=True)
class CaptionedPictures:
    """`images`, the captions of each, where each is, how many pictures the file lists, and the name
    of each there, which no other has."""

    images: LazyPictures
    captions: list[list[str]]
    paths: list[Path]
    total: int
    names: list[str]


def read_captions(
    path: str | Path,
    images: str | Path | None = None,
    split: str | None = "test",
    per_picture: int | None = None,
    samples: int | None = None,
) -> CaptionedPictures:
    """Pictures in the order of the file, with their captions.

    Args:
        path: COCO's `captions_*.json`; Karpathy's JSON of COCO or Flickr30K, as released or as a
            list of {"image", "caption"}; or a table (.csv, .tsv, .txt; see `table_rows`) with a
            column for pictures and one for captions, a caption a row.
        images: where the paths of pictures start; None: the folder of the file.
        split: of a file that holds several ("split" in its records), the one that is measured.
        per_picture: at most that many captions of a picture, the first ones.
        samples: only that many pictures, spread over the file.

    Raises:
        ValueError: naming file and record, for a file of another kind, a record without picture or
            caption, and a first picture that is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of captions")
    if per_picture is not None and per_picture < 1:
        raise ValueError(f"{per_picture=} must be 1 or more; leave it out to use all captions")
    found: dict[str, list[str]] = {}
    for name, caption in _pairs(path, split):
        found.setdefault(name, []).append(caption)
    root = Path(images) if images else path.parent
    names = [list(found)[place] for place in evenly_spread(len(found), samples)] if found else []
    if not names:
        of_split = f" of the split {split!r}" if split else ""
        raise ValueError(f"{path} lists no picture with a caption{of_split}")
    if not (root / names[0]).is_file():
        advice = "say where pictures are with images=FOLDER"
        raise ValueError(f"{path}: the picture {names[0]} is not in {root}; {advice}")
    paths = [root / name for name in names]
    captions = [found[name][:per_picture] for name in names]
    return CaptionedPictures(LazyPictures(paths, read_image), captions, paths, len(found), names)


def _pairs(path: Path, split: str | None) -> Iterator[Pair]:
    if path.suffix in (".csv", ".tsv", ".txt"):
        return _table_pairs(path, split)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("images"), list):
        if isinstance(data.get("annotations"), list):
            return _coco_pairs(path, data)
        return _record_pairs(path, data["images"], split)
    if isinstance(data, list):
        return _record_pairs(path, data, split)
    kinds = "COCO's images and annotations, nor Karpathy's images with sentences"
    raise ValueError(f"{path} has neither {kinds}, nor is it a list")


def _coco_pairs(path: Path, data: dict[str, Any]) -> Iterator[Pair]:
    captions: dict[Any, list[str]] = {}
    for number, record in enumerate(data["annotations"]):
        place = f"{path}: annotation {number}"
        captions.setdefault(_field(record, ("image_id",), place), []).append(_text(record, ("caption",), place))
    for number, record in enumerate(data["images"]):
        place = f"{path}: image {number}"
        known, name = _field(record, ("id",), place), _text(record, ("file_name",), place)
        if known not in captions:
            raise ValueError(f"{place} ({name}): there is no annotation with its id {known}")
        yield from ((name, caption) for caption in captions.pop(known))
    if captions:
        image = next(iter(captions))
        raise ValueError(f"{path}: annotations speak of the image {image}, which is not among the images")


def _record_pairs(path: Path, records: list[Any], split: str | None) -> Iterator[Pair]:
    for number, record in enumerate(records):
        place = f"{path}: record {number}"
        if isinstance(record, dict) and split and record.get("split", split) != split:
            continue
        name = _text(record, PICTURE_COLUMNS[:3], place)
        if "filepath" in record and "filename" in record:
            name = f"{record['filepath']}/{name}"
        said = record.get("sentences", record.get("caption", record.get("captions")))
        said = [said] if isinstance(said, str) else said
        if not isinstance(said, list) or not said:
            raise ValueError(f"{place} ({name}) has no captions")
        for caption in said:
            yield name, caption if isinstance(caption, str) else _text(caption, ("raw",), f"{place} ({name})")


def _table_pairs(path: Path, split: str | None) -> Iterator[Pair]:
    found = read_table(path)
    _, columns = next(found, (1, []))
    picture, caption = ([name for name in columns if name in known] for known in (PICTURE_COLUMNS, CAPTION_COLUMNS))
    if not picture or not caption:
        raise ValueError(
            f"{path}: its first line must name a column of pictures ({', '.join(PICTURE_COLUMNS)}) and one of captions "
            f"({', '.join(CAPTION_COLUMNS)}); it names {', '.join(columns) or 'none'}"
        )
    for line, fields in found:
        row = dict(zip(columns, fields, strict=True))
        if split and (row.get("split") or split) != split:
            continue
        place = f"{path}: line {line}"
        yield _text(row, (picture[0],), place), _text(row, (caption[0],), place)


def _field(record: Any, names: tuple[str, ...], place: str) -> Any:
    if isinstance(record, dict):
        for name in names:
            if record.get(name) is not None:
                return record[name]
    raise ValueError(f"{place} has no {' or '.join(repr(name) for name in names)}")


def _text(record: Any, names: tuple[str, ...], place: str) -> str:
    found = _field(record, names, place)
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{place}: {names[0]} is {found!r}, not a text")
    return found
