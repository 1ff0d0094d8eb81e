"""A page with some samples as a stage's model sees them: the squares of their pictures, the text,
and what of it is learnt."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.files import write_text
from lightning_internvl.inference.collators import View
from lightning_internvl.model.compose import Build

SAMPLES = 8
LARGEST = 224  # px of a square on the page
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "section{border-top:1px solid #ccc;padding:1rem 0}img{margin:2px;max-width:14rem}"
    "p{font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere}mark{background:#ffe08a}"
    "i{color:#06c;font-style:normal}b{color:#b00}"
)


def write_preview(settings: StageSettings, view: View, path: Path, build: Build) -> None:
    """Write the page for one stage.

    Args:
        view: of its model, which needs no weights.

    Raises:
        ValueError: if it has no sample.
    """
    data, name = settings.data, escape(settings.name)
    dataset = build(data.dataset(settings.reads))
    count = SAMPLES if data.endless else min(SAMPLES, len(dataset))
    if not count:
        raise ValueError("there are no samples")
    total = count if data.endless else len(dataset)
    places = np.linspace(0, total - 1, count).astype(int).tolist()
    sections = "".join(_sample(dataset, view.training, place) for place in places)
    legend = "<mark>marked text is learnt</mark>, <i>blue</i> stands for a picture"
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    body = f"<h1>What {name} sees</h1><div>{legend}</div>{sections}"
    write_text(path, f'<!doctype html><html lang="en">{head}{body}</html>\n')


def _sample(dataset: Any, collate: Any, place: int) -> str:
    try:
        sample = dataset[place]
        found = collate.prepare({**sample, "draw": (0, place)})
    except ValueError as error:
        return f"<section><b>left out</b>: {escape(str(error))}</section>"
    pictures = [*found.get("pictures", ()), *found.get("videos", ())]
    if "tiles" in found:
        pictures.append(found["tiles"])
    images = "".join(_image(square) for picture in pictures for square in picture)
    title, texts = escape(str(found["key"])), "".join(_texts(found, collate))
    return f"<section><h2>{title}</h2><div>{images}</div>{texts}</section>"


def _texts(found: dict[str, Any], collate: Any) -> Iterator[str]:
    """The token rows of a prepared sample as text."""
    if "label" in found:
        yield f"<p>class {found['label']}</p>"
    if "row" in found:
        ids, labels = found["row"]
        if len(ids) == len(labels) and not collate.split_answers:
            yield _row(collate, ids, [label != IGNORE_INDEX for label in labels])
        else:  # an encoder-decoder: what is read, and what is written
            yield _row(collate, ids, [False] * len(ids)) + _row(collate, labels, [True] * len(labels))
    for task in getattr(collate, "tasks", ()):
        labels = found["itg_labels"] if task == "itg" else [IGNORE_INDEX] * len(found[task])
        learnt = [label != IGNORE_INDEX for label in labels]
        yield f"<div>{task}</div>" + _row(collate, found[task], learnt)


def _row(collate: Any, ids: Sequence[int], learnt: Sequence[bool]) -> str:
    tokenizer, names = collate.tokenizer, getattr(collate, "image_tokens", None)
    placeholders = [token for token in (names.context, names.video) if token] if names else []
    visual = set(map(tokenizer.convert_tokens_to_ids, placeholders))
    parts = []
    for (is_learnt, is_visual), run in itertools.groupby(
        zip(ids, learnt, strict=True), key=lambda pair: (pair[1], pair[0] in visual)
    ):
        tokens = [token for token, _ in run]
        if is_visual:
            parts.append(f"<i>[{len(tokens)} visual tokens]</i>")
        else:
            text = escape(tokenizer.decode(tokens))
            parts.append(f"<mark>{text}</mark>" if is_learnt else text)
    return f"<p>{''.join(parts)}</p>"


def _image(square: np.ndarray) -> str:
    image = Image.fromarray(square)
    image.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'
