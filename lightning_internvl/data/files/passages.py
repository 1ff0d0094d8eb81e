"""Records of a query, the document that answers it, and wrong documents (hard negatives), each a text,
pictures or both, with the names of columns that sentence-transformers has (query or anchor, positive,
negative)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.picture_sources import Picture, looks_like_path, pictures_of
from lightning_internvl.data.files.record_fields import Fields, is_empty
from lightning_internvl.data.files.record_formats import ANSWERS, text_of
from lightning_internvl.data.templates import IMAGE

QUERIES, POSITIVES, NEGATIVES = ("query", "anchor"), ("positive",), ("negatives", "negative")
TEXTS = ("text", "caption")  # of a passage that is more than a text


class Passage(NamedTuple):
    """What is embedded: a text with marks of pictures, and these in order."""

    text: str
    images: list[Picture]


class Passages(NamedTuple):
    """A query with the right document and wrong ones."""

    query: Passage
    positive: Passage
    negatives: list[Passage]

    def each(self) -> list[Passage]:
        """All of them in this order."""
        return [self.query, self.positive, *self.negatives]


def is_query(record: Mapping[str, Any]) -> bool:
    """Whether a record says a query and its document, or half of that."""

    def has(names: tuple[str, ...]) -> bool:
        return any(name in record and not is_empty(record[name]) for name in names)

    return has(POSITIVES) or has(NEGATIVES) or (has(QUERIES) and not has(ANSWERS))


def read_passages(fields: Fields) -> Passages:
    """The query and the documents of a record. Raises BadSample for one that is missing or says nothing,
    for marks and pictures that differ in number, and for a wrong document that is the right one."""
    query, positive, negatives = (fields.take(*names) for names in (QUERIES, POSITIVES, NEGATIVES))
    for name, given, other in (("query", query, "positive"), ("positive", positive, "query")):
        if given is None:
            raise BadSample(f"it has no {name!r}; give {name!r} beside {other!r}", f"no {name}")
    listed = negatives if isinstance(negatives, list) else [] if negatives is None else [negatives]
    found = Passages(
        _passage(query, "query"),
        _passage(positive, "positive"),
        [_passage(one, f"negative {place}") for place, one in enumerate(listed)],
    )
    if found.positive in found.negatives:
        place = found.negatives.index(found.positive)
        raise BadSample(f"negative {place} equals the positive, so that nothing tells them apart", "equal documents")
    return found


def _passage(given: Any, name: str) -> Passage:
    """A text, or a mapping with a text, pictures or both."""
    if isinstance(given, str) and looks_like_path(given) and len(given.split()) == 1:
        raise BadSample(f'the {name} is the path of a picture; write {{"image": {given[:80]!r}}}', "unknown format")
    part = Fields(given if isinstance(given, Mapping) else {"text": given})
    said = part.take(*TEXTS)
    text = "" if said is None else text_of(said, f"the {name}").strip()
    images = pictures_of(part)
    if not text and not images:
        raise BadSample(f"the {name} is empty; give a text, a picture or both", f"empty {name.split()[0]}")
    if unread := sorted(part.unread()):
        raise BadSample(f"the {name} has {', '.join(map(repr, unread))}; a passage has text and image", "unknown format")
    return Passage(marked(text, len(images), name), images)


def marked(text: str, pictures: int, name: str) -> str:
    """A text with a mark for each picture; where it has none they come first. Raises BadSample."""
    marks = text.count(IMAGE)
    if marks not in (0, pictures):
        raise BadSample(f"the {name} has {pictures} pictures but {marks} {IMAGE!r} marks", "placeholders")
    return text if marks else "\n".join([*[IMAGE] * pictures, *([text] if text else [])])
