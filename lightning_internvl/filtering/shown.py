"""A few kept and dropped pairs of each language, as small pictures for the report."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable
from typing import Any

from PIL import Image

from lightning_internvl.data.files.images import read_image
from lightning_internvl.filtering.measures import Row, language_of

FROM = 4  # shards, the first ones, of which pairs are shown
EACH, MOST = 2, 60  # pairs of a language that a rule has dropped, or that are kept; pairs in all
SIDE = 96  # pixels of the longer side of a picture as it is shown
TOLD = 200  # characters of a caption

ShownPair = dict[str, Any]


def shown_pair(pair: dict[str, Any], row: Row, rule: str) -> ShownPair:
    """A pair as the report shows it: {"rule": what dropped it or "kept", "language", "caption",
    "similarity", "png": a file in base64}."""
    image, file = Image.fromarray(read_image(pair["image"], SIDE)), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=80)
    picture = base64.b64encode(file.getvalue()).decode()
    told = {"rule": rule, "language": language_of(row), "caption": pair["caption"][:TOLD]}
    return {**told, "similarity": row.get("similarity"), "png": picture}


class Shown:
    """Chooses the first pairs of each language and rule."""

    def __init__(self, shard: int) -> None:
        self.counts, self.shard = Counter[tuple[str, str]](), shard

    def wanted(self, row: Row, rule: str) -> bool:
        """Whether the next pair is shown."""
        name = language_of(row), rule
        few = self.shard < FROM and self.counts[name] < EACH and self.counts.total() < MOST
        self.counts[name] += few
        return few


def first_of_each(pairs: Iterable[ShownPair]) -> list[ShownPair]:
    """Those of all shards that are shown."""
    counts, found = Counter[tuple[str, str]](), list[ShownPair]()
    for pair in pairs:
        name = pair["language"], pair["rule"]
        counts[name] += 1
        found += [pair] if counts[name] <= EACH else []
    return found[:MOST]
