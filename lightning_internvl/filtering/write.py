"""The last pass: what is kept of a shard goes into a new one, with its scores, and what is not is
listed with the rule."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_internvl.config.filter_checks import ORDER, RANGES, SIMILARITY
from lightning_internvl.data.shards.tar import Record, TarShards, TarWriter
from lightning_internvl.files import read_json, write_json
from lightning_internvl.filtering.decide import BAD, KEPT
from lightning_internvl.filtering.measures import TOLD_LANGUAGE, Row, language_of
from lightning_internvl.filtering.scores import UNUSABLE, read_rows, scores_file, told_key, write_rows
from lightning_internvl.filtering.shown import Shown, ShownPair, first_of_each, shown_pair
from lightning_internvl.filtering.sources import JoinedShards

UNWRITTEN = ("picture", "caption", TOLD_LANGUAGE)  # scores that say nothing to who reads the pairs
# Columns of a histogram: of similarities, and of the other scores (of which 1 is the least)
SHOWN = 50  # languages that are counted apart, the most frequent ones
PER_UNIT, PER_DOUBLING = 40, 2


def written_marker(folder: Path, shard: int) -> Path:
    """The file that marks a shard as written; it holds the shard's counts."""
    return folder / "written" / f"{shard:06d}.json"


def new_shard(folder: Path, shard: int) -> Path:
    """Where the kept pairs of a shard go; there is no file where none are."""
    return folder / "shards" / f"{shard:06d}.tar"


def write_shard(shards: JoinedShards, shard: int, folder: Path, reasons: Sequence[int]) -> None:
    """Write what is kept of one shard, and last of all its marker.

    Args:
        reasons: what becomes of each row of its scores.

    Raises:
        ValueError: if the shard holds other records than when it was scored.
    """
    rows = read_rows(scores_file(folder, shard))
    kept = {place for place, reason in enumerate(reasons) if reason == KEPT}
    path, chosen, shown = new_shard(folder, shard), Shown(shard), list[ShownPair]()
    if kept:
        with TarWriter(path) as tar:
            for place, record in enumerate(_records(shards, shard, max(kept) + 1)):
                row = rows[place]
                if told_key(record["key"]) != row["key"]:
                    raise ValueError(
                        f"shard {shards.name(shard)} has changed since it was scored: record {place} is {record['key']!r}, it "
                        f"was {row['key']!r}; delete {scores_file(folder, shard)} and what lies beside `scores`, then resume"
                    )
                rule = _rule_name(reasons[place])
                if reasons[place] != BAD and chosen.wanted(row, rule):
                    shown.append(shown_pair(shards.pair(record), row, rule))
                if place in kept:
                    tar.write(scored_record(shards, shard, place, record, row))
            if tar.written != len(kept):
                raise ValueError(
                    f"shard {shards.name(shard)} has changed since it was scored: it now ends "
                    f"after {tar.written} of the {len(kept)} pairs that are kept of it"
                )
    judged = zip(rows, reasons, strict=True)
    dropped = [{"key": row["key"], "rule": _rule_name(why)} for row, why in judged if why != KEPT]
    write_rows(folder / "dropped" / f"{shard:06d}.jsonl", dropped)
    size = path.stat().st_size if kept else 0
    write_json(written_marker(folder, shard), {**_counts(shards.source(shard), rows, reasons, size), "shown": shown})


def _records(shards: JoinedShards, shard: int, count: int) -> Iterable[Record]:
    """The first records of a shard."""
    # Which asks for no more: what follows may be broken
    return itertools.islice(shards.read(shard), count)


def scored_record(shards: JoinedShards, shard: int, place: int, record: Record, row: Row) -> Record:
    """A record with its scores in its json; files of a tar stay, columns become files."""
    scores = {name: value for name, value in row.items() if name not in ("key", *UNWRITTEN)}
    if not isinstance(shards.sources[shards.source(shard)], TarShards):
        pair = shards.pair(record)
        said = {name: value for name, value in pair.items() if name not in ("image", "caption")}
        return {
            "key": f"{shard:06d}_{place:06d}",
            shards.image or "jpg": pair["image"],
            "json": {**said, shards.caption or "caption": pair["caption"], "scores": scores},
        }
    said = record.get("json", {})
    said = json.loads(said) if isinstance(said, bytes | str) else said
    return {**record, "json": {**said, "scores": scores}}


def _rule_name(reason: int) -> str:
    return {KEPT: "kept", BAD: UNUSABLE}.get(reason) or ORDER[reason - 1]


def _counts(source: str, rows: list[Row], reasons: Sequence[int], size: int) -> dict[str, Any]:
    histograms: dict[str, dict[str, Counter[int]]] = {}
    for row, reason in zip(rows, reasons, strict=True):
        for score in RANGES:
            if score in row:
                counts = histograms.setdefault(score, {"seen": Counter(), "kept": Counter()})
                counts["seen"][column_of(score, row[score])] += 1
                counts["kept"][column_of(score, row[score])] += reason == KEPT
    languages: dict[str, Counter[str]] = {}
    for row, reason in zip(rows, reasons, strict=True):
        if reason != BAD:
            found = languages.setdefault(language_of(row) or "none", Counter())
            found.update(["pairs", _rule_name(reason)])
    return {
        "source": source,
        "languages": languages,
        "pairs": len(rows),
        "kept": reasons.count(KEPT),
        "bytes": size,
        "dropped": Counter(_rule_name(reason) for reason in reasons if reason not in (KEPT, BAD)),
        UNUSABLE: Counter(row[UNUSABLE] for row in rows if UNUSABLE in row),
        "histograms": histograms,
    }


def column_of(score: str, value: float) -> int:
    """The column of a histogram that a value falls into."""
    if score == SIMILARITY:
        return math.floor(value * PER_UNIT)
    return math.floor(PER_DOUBLING * math.log2(max(value, 1)))


def edge_of(score: str, column: int) -> float:
    """Where a column of a histogram begins."""
    return column / PER_UNIT if score == SIMILARITY else 2 ** (column / PER_DOUBLING)


def sum_counts(folder: Path, shards: int) -> dict[str, Any]:
    """The counts of all shards together; columns of histograms by where they begin."""
    total: dict[str, Any] = {"pairs": 0, "kept": 0, "bytes": 0, "shown": []}
    total |= {"kept_by_source": Counter(), "dropped": Counter(), UNUSABLE: Counter(), "histograms": {}, "languages": {}}
    for shard in range(shards):
        one = read_json(written_marker(folder, shard))
        total["shown"] += one["shown"]
        for name in ("pairs", "kept", "bytes"):
            total[name] += one[name]
        total["kept_by_source"][one["source"]] += one["kept"]
        for name in ("dropped", UNUSABLE):
            total[name].update(one[name])
        for language, counts in one["languages"].items():
            total["languages"].setdefault(language, Counter()).update(counts)
        for score, counts in one["histograms"].items():
            sums = total["histograms"].setdefault(score, {"seen": Counter(), "kept": Counter()})
            for kind in sums:
                sums[kind].update({int(column): number for column, number in counts[kind].items()})
    total["dropped"] = {rule: total["dropped"][rule] for rule in ORDER if total["dropped"][rule]}
    total[UNUSABLE] = dict(sorted(total[UNUSABLE].items()))
    total["shown"] = first_of_each(total["shown"])
    most = sorted(total["languages"].items(), key=lambda one: (-one[1]["pairs"], one[0]))
    rest: dict[str, Counter[str]] = {"others": sum((counts for _, counts in most[SHOWN:]), Counter())} if most[SHOWN:] else {}
    total["languages"] = dict(most[:SHOWN]) | rest
    histograms = total["histograms"]
    total["histograms"] = {s: _table(s, histograms[s]) for s in RANGES if s in histograms}
    return total


def _table(score: str, counts: Mapping[str, Counter[int]]) -> list[list[float]]:
    """[begin, end, seen, kept] of all columns that are not empty."""
    columns = sorted(counts["seen"])
    return [
        [
            round(edge_of(score, column), 4),
            round(edge_of(score, column + 1), 4),
            counts["seen"][column],
            counts["kept"][column],
        ]
        for column in columns
    ]
