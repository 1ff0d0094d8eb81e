"""Which pairs are kept: the pass between scoring and writing, which sees the scores of all pairs
and none of the pairs.

What it decides depends on the scores and the order of the shards alone, not on who scored them
when. It keeps columns of numbers on disk (25 bytes a pair, twice) and reads them in pieces, so that
memory does not grow with the number of pairs.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_internvl.config.filter_checks import LANGUAGES, ORDER, RANGES, SIMILARITY, TOP_SHARE
from lightning_internvl.files import atomic_file, naming
from lightning_internvl.filtering.measures import Row, language_of
from lightning_internvl.filtering.scores import DIGITS, UNUSABLE

KEPT, BAD = 0, 255  # reasons beside 1 + the place of a rule in ORDER
PIECE = 2**24  # pairs that are looked at together
APART = 64  # languages of which a share is kept each; all rarer ones are one more
STEPS = 10**DIGITS  # values of a similarity from 0 to 1
Rules = Mapping[str, Mapping[str, Any] | None]
KINDS = {"reason": np.uint8, "similarity": np.int32, "picture": np.uint64, "caption": np.uint64, "language": np.uint32}
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that numbers of 32 bits times it stay apart


class Columns:
    """The columns that decisions need, a file each: `reason` (KEPT, BAD, or the rule that drops a
    pair), `similarity` in steps of a millionth, `picture` and `caption` hashes, and `language` of the
    caption, by a hash too. `starts` tells where each shard begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = np.load(folder / "starts.npy")

    @classmethod
    def join(cls, folder: Path, shards: int) -> Columns:
        """The columns of all shards (see `write_columns`) one after the other."""
        starts = np.zeros(shards + 1, dtype=np.int64)
        with naming(folder), contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((folder / name).open("wb")) for name in KINDS}
            for shard in range(shards):
                found = np.load(columns_file(folder, shard))
                starts[shard + 1] = starts[shard] + len(found)
                for name, file in files.items():
                    file.write(found[name].tobytes())
            np.save(folder / "starts.npy", starts)
        return cls(folder)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> np.ndarray:
        """A column of all pairs, which stays on disk."""
        if not len(self):
            return np.zeros(0, dtype=KINDS[name])
        return np.memmap(self.folder / name, dtype=KINDS[name], mode="r+")

    def pieces(self) -> Iterator[slice]:
        """All pairs, some at a time."""
        return (slice(start, start + PIECE) for start in range(0, len(self), PIECE))

    def reasons(self, shard: int) -> list[int]:
        """What becomes of the pairs of a shard."""
        return self.column("reason")[self.starts[shard] : self.starts[shard + 1]].tolist()

    def drop(self, positions: np.ndarray, rule: str) -> None:
        """Drop pairs by a rule."""
        self.column("reason")[positions] = reason_code(rule)


def reason_code(rule: str) -> int:
    """How a rule is written among the reasons."""
    return 1 + ORDER.index(rule)


def columns_file(folder: Path, shard: int) -> Path:
    """Where the columns of one shard lie until all are joined."""
    return folder / f"{shard:06d}.npy"


def write_columns(folder: Path, shard: int, rows: Sequence[Row], rules: Rules) -> None:
    """The columns of one shard, with the reasons of the rules that look at one pair at a time."""
    found = np.zeros(len(rows), dtype=list(KINDS.items()))
    for place, row in enumerate(rows):
        bad = UNUSABLE in row
        found[place] = (
            BAD if bad else _reason(row, rules),
            round(row.get(SIMILARITY, 0.0) * STEPS),
            *(int(row.get(name, "0"), 16) for name in ("picture", "caption")),
            zlib.crc32(language_of(row).encode()),
        )
    with atomic_file(columns_file(folder, shard)) as draft, draft.open("wb") as stream:
        np.save(stream, found)


def _reason(row: Row, rules: Rules) -> int:
    """The first rule that a pair fails, of those that look at one pair at a time."""
    for place, rule in enumerate(ORDER):
        limits = rules.get(rule)
        if limits is None or rule not in (*RANGES, *LANGUAGES):
            continue
        value = value_of(row, rule, limits)
        low, high = limits.get("min"), limits.get("max")
        if (low is not None and value < low) or (high is not None and value > high):
            return 1 + place
    return KEPT


def value_of(row: Row, rule: str, limits: Mapping[str, Any]) -> float:
    """The number of a pair that a rule limits."""
    if rule == "scripts":
        return round(sum(row["scripts"].get(script, 0.0) for script in limits["allowed"]), 4)
    if rule == "language":
        return row["language_probability"] if row["language"] in limits["allowed"] else 0.0
    return row[rule]


def decide(columns: Columns, rules: Rules) -> float | None:
    """Drop what only a look at all pairs can tell: pictures that came before with a caption of the
    same language, captions that came before, and what is not in the top share of its language.

    Returns:
        the least similarity from which on pairs of a language are kept; None without `keep_share`
    """
    if (same := rules.get("same_picture")) is not None:
        columns.drop(repeated_pairs(columns, "picture", 1), "same_picture")
        for shift in range(same["distance"] + 1) if same["distance"] else ():
            columns.drop(near_duplicates(columns, same["distance"], shift), "same_picture")
    if (same := rules.get("same_caption")) is not None:
        columns.drop(repeated_pairs(columns, "caption", same["copies"]), "same_caption")
    share = (rules.get(SIMILARITY) or {}).get("keep_share")
    if share is None:
        return None
    counts = Counter[int]()
    for piece in columns.pieces():
        kept = columns.column("language")[piece][columns.column("reason")[piece] == KEPT]
        counts.update(dict(zip(*(x.tolist() for x in np.unique(kept, return_counts=True)), strict=True)))
    own = [language for language, _ in counts.most_common(APART)]
    groups = [[language] for language in own] + [[x for x in counts if x not in own]]
    return min((_top_share(columns, share, np.array(group, np.uint32)) for group in groups if group), default=0.0)


def _top_share(columns: Columns, share: float, languages: np.ndarray) -> float:
    """Keep a share of those that are left of some languages, by the exact quantile of counted
    values. A model is surer of some languages than of others, so that a share of all would leave
    little of the others."""
    reason, similarity, language = (columns.column(name) for name in ("reason", "similarity", "language"))

    def chosen(piece: slice) -> np.ndarray:
        return (reason[piece] == KEPT) & np.isin(language[piece], languages)

    counts = np.zeros(2 * STEPS + 3, dtype=np.int64)  # rounding may step over 1
    for piece in columns.pieces():
        counts += np.bincount(similarity[piece][chosen(piece)] + STEPS + 1, minlength=len(counts))
    wanted = share * counts.sum()
    reached = np.flatnonzero(np.cumsum(counts[::-1]) >= wanted - 1e-9)
    threshold = len(counts) - 1 - int(reached[0]) - STEPS - 1
    for piece in columns.pieces():
        below = chosen(piece) & (similarity[piece] < threshold)
        reason[piece][below] = reason_code(TOP_SHARE)
    return threshold / STEPS


# --- what occurred before -----------------------------------------------------------------------


def repeated_pairs(columns: Columns, name: str, copies: int) -> np.ndarray:
    """Positions of kept pairs whose hash occurs in at least `copies` kept pairs before them; of
    pictures, with captions of the same language."""
    found = []
    for values, places in _parts(columns, name, 64, 0):
        if name == "picture":
            values = values ^ (columns.column("language")[places] * MIX)
        order = np.argsort(values, kind="stable")  # places rise within equal values
        values, places = values[order], places[order]
        found.append(places[copies:][values[copies:] == values[: max(0, len(values) - copies)]])
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def near_duplicates(columns: Columns, distance: int, band: int) -> np.ndarray:
    """Positions of kept pairs whose picture differs in at most `distance` bits from one before
    them with a caption of the same language, and agrees in one band.

    Two numbers that differ in d bits agree in one of d + 1 bands, so that all bands together find
    all.
    """
    edges = [64 * i // (distance + 1) for i in range(distance + 2)]
    found = []
    for values, places in _parts(columns, "picture", edges[band + 1] - edges[band], edges[band]):
        bands = _bits(values, edges[band + 1] - edges[band], edges[band])
        order = np.argsort(bands, kind="stable")
        values, places, bands = values[order], places[order], bands[order]
        languages = columns.column("language")[places]
        near, here = np.zeros(len(values), dtype=bool), np.arange(len(values))
        place = here - np.searchsorted(bands, bands)  # among those of the same band
        for back in range(1, len(values)):
            here = here[place[here] >= back]
            if not len(here):
                break
            alike = np.bitwise_count(values[here] ^ values[here - back]) <= distance
            near[here] |= alike & (languages[here] == languages[here - back])
        found.append(places[near])
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _parts(columns: Columns, name: str, width: int, shift: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hashes and positions of all kept pairs, in so many parts that each fits into memory; those
    that agree in some bits come in the same part."""
    count = -(-len(columns) // PIECE)
    reason, hashes = columns.column("reason"), columns.column(name)
    for part in range(count):
        values, places = [], []
        for piece in columns.pieces():
            some = hashes[piece]
            chosen = reason[piece] == KEPT
            if count > 1:
                chosen &= _bits(some, width, shift) % np.uint64(count) == part
            values.append(some[chosen])
            places.append(np.flatnonzero(chosen) + piece.start)
        yield np.concatenate(values), np.concatenate(places)


def _bits(values: np.ndarray, width: int, shift: int) -> np.ndarray:
    mask = np.uint64(2**width - 1)
    return (values >> np.uint64(shift)) & mask
