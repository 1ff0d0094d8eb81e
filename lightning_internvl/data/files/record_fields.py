"""The keys of a record, and which of them nothing read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What is said about a record, and no part of what is learnt from it.
DESCRIPTIVE = frozenset({
    "id", "idx", "index", "uid", "uuid", "key", "image_id", "img_id", "video_id", "question_id", "sample_id",
    "conversation_id", "annotation_id", "source", "sources", "dataset", "dataset_name", "data_source", "split", "subset",
    "language", "lang", "locale", "category", "categories", "task", "task_type", "type", "topic", "domain", "difficulty",
    "model", "license", "url", "image_url_source", "width", "height", "width_list", "height_list", "size", "image_size",
    "length", "num_tokens", "token_count", "metadata", "meta", "info", "tags", "name", "title", "filename", "created_at",
    "timestamp", "annotator", "score", "rating", "ratings", "similarity", "detail", "format",
})  # fmt: skip
RATINGS = ("_rating", "_ratings", "_min", "_score", "_id", "_ids")  # FineVision's `relevance_ratings`, `relevance_min`


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON; raises ValueError for a name that has two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for place, (name, _) in enumerate(pairs) if name in dict(pairs[:place]))
        raise ValueError(f"{twice[:80]!r} stands in it twice")
    return found


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: none, an empty text or list, or the NaN of a table."""
    return value is None or value in ("", [], {}) or (isinstance(value, float) and value != value)


class Fields:
    """A mapping that keeps account of the keys that were asked for."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.asked: set[str] = set()

    def has(self, *names: str) -> bool:
        """Whether one of the keys is there and says something."""
        return any(name in self.given and not is_empty(self.given[name]) for name in names)

    def take(self, *names: str) -> Any:
        """The value of the first key that says something; None if none does."""
        given = self.given
        for name in names:
            if name in given and not is_empty(given[name]):
                self.asked.add(name)
                return given[name]
        return None

    def unread(self) -> Iterator[str]:
        """The keys that say something of what is to be learnt, and that nothing asked for."""
        for name, value in self.given.items():
            known = name in self.asked or str(name).lower() in DESCRIPTIVE or str(name).startswith("__")
            if not known and not str(name).lower().endswith(RATINGS) and not is_empty(value):
                yield str(name)[:60]
