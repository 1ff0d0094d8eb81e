"""Settings of training data from shards, and what is wrong with them, found before any model is built.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_internvl.checks import some, suggestion
from lightning_internvl.data.ledger import TRIES
from lightning_internvl.data.records import PARQUET
from lightning_internvl.data.shard_names import protocol_of
from lightning_internvl.data.shards import ShardError, Shards, TarShards
from lightning_internvl.data.table_shards import ParquetShards

ONLY = "shards"  # the name of a source that has none
SOURCE_KEYS = ("shards", "weight", "samples", "language")
BY_SIZE = {"size": 1.0, "sqrt": 0.5}
LOOKED_FOR = 200_000  # shards whose files are looked for before the start; of more the first ones
EXAMPLE = "'data.shards=\"DIR/{00000..00099}.tar\"'"  # the shell and Hydra both want quotes around braces


def sources_of(shards: Any, sources: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The sources by name, whichever way they are given.

    Raises:
        ValueError: for none, both, or a setting that a source does not have.
    """
    if (shards is None) == (not sources):
        given = "both data.shards and data.sources are" if shards is not None else "no shards are"
        raise ValueError(f"{given} given; give {EXAMPLE}, or several as data.sources={{NAME: {{shards: ..., weight: 2}}}}")
    found = {ONLY: {"shards": shards}} if sources is None or shards is not None else {}
    for name, source in (sources or {}).items():
        source = dict(source) if isinstance(source, Mapping) and "_target_" not in source else {"shards": source}
        if unknown := [key for key in source if key not in SOURCE_KEYS]:
            raise ValueError(f"data.sources.{name}: there is no setting {unknown[0]!r}; {suggestion(unknown[0], SOURCE_KEYS)}")
        if source.get("shards") is None:
            raise ValueError(f"data.sources.{name} has no shards; give data.sources.{name}.shards=...")
        found[name] = source
    return found


def open_shards(given: Any) -> Shards:
    """The shards of a source: an object that reads them, or paths, URLs and patterns of tar or parquet files.

    Raises:
        ValueError: for a pattern that is broken or matches nothing, or where a package is missing.
    """
    if hasattr(given, "read"):
        return given
    first = given if isinstance(given, str | Path) else next(iter(given), "")
    return (ParquetShards if str(first).endswith(PARQUET) else TarShards)(given)


def weights_of(given: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int], weights: Any) -> dict[str, float]:
    """The weight of each source.

    Args:
        given: the sources, with their own "weight" and "samples".
        sizes: their numbers of shards.
        weights: null, "size", "sqrt", or numbers by name.

    Raises:
        ValueError: for weights that are none, or none of which is above 0.
    """
    if isinstance(weights, str):
        if weights not in BY_SIZE:
            raise ValueError(f"data.weights={weights!r} is not known; valid choices: null, {', '.join(BY_SIZE)}, numbers by name")
        known = [name for name, source in given.items() if source.get("samples")]
        if known and len(known) < len(given):
            lacking = ", ".join(name for name in given if name not in known)
            raise ValueError(f"data.weights={weights}: {lacking} must say their samples too, as {', '.join(known)} do")
        numbers = {name: source["samples"] for name, source in given.items()} if known else sizes
        return {name: float(number) ** BY_SIZE[weights] for name, number in numbers.items()}
    found = {name: source.get("weight", 1) for name, source in given.items()} if weights is None else dict(weights)
    if unknown := [name for name in found if name not in given]:
        raise ValueError(f"data.weights: there is no source {unknown[0]!r}; {suggestion(unknown[0], given)}")
    if lacking := [name for name in given if name not in found]:
        raise ValueError(f"data.weights has none for {', '.join(lacking)}; 0 leaves a source out")
    for name, weight in found.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
            raise ValueError(f"the weight of source {name} is {weight!r}; it must be a number from 0 on")
    if not any(found.values()):
        raise ValueError(f"all sources have weight 0 ({', '.join(found)}); give one of them more")
    return {name: float(weight) for name, weight in found.items()}


def knots_of(
    given: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int], weights: Any, schedule: Any
) -> list[dict[str, Any]]:
    """Steps and the weights there: those of a schedule, or the same for ever.

    Raises:
        ValueError: for both, a schedule that is none, and what `weights_of` refuses.
    """
    if schedule is None:
        return [{"step": 0, "weights": weights_of(given, sizes, weights)}]
    if weights is not None:
        raise ValueError("data.weights and data.schedule exclude each other; leave one out")
    if not isinstance(schedule, list) or not all(
        isinstance(knot, Mapping) and set(knot) == {"step", "weights"} for knot in schedule
    ):
        raise ValueError(f"data.schedule={schedule!r} is no list of steps, as in [{{step: 0, weights: {{NAME: 1}}}}]")
    steps = [knot["step"] for knot in schedule]
    if not all(isinstance(step, int) for step in steps) or steps[:1] != [0] or steps != sorted(set(steps)):
        raise ValueError(f"the steps of data.schedule start at 0 and rise, but they are {steps}")
    return [{"step": knot["step"], "weights": weights_of(given, sizes, knot["weights"])} for knot in schedule]


def stream_faults(data: Mapping[str, Any], processes: int | None, look: bool) -> Iterator[str]:
    """What is wrong with a data group of shards.

    Args:
        processes: of the run; None where that is not known yet.
        look: whether to look for the shards: for each file, and in each source for a sample.
    """
    numbers = {name: data.get(name) for name in ("lanes", "turns", "shuffle", "run")}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            yield f"data.{name}={number!r} must be a whole number above 0"
            return
    lanes, turns, workers = data["lanes"], data["turns"], data["num_workers"]
    if workers and turns % workers:
        fitting = ", ".join(str(n) for n in range(turns + 1) if n == 0 or turns % n == 0)
        yield (
            f"data.num_workers={workers} processes cannot share data.turns={turns} evenly; fitting numbers: {fitting}; "
            "a new run may have more turns"
        )
    if processes and lanes % processes:
        fitting = f"{processes}, {2 * processes}, ..."
        yield f"data.lanes={lanes} must be a multiple of the {processes} processes; fitting numbers: {fitting}"
    if look:
        yield from _source_faults(data)


def _source_faults(data: Mapping[str, Any]) -> Iterator[str]:
    try:
        given = sources_of(data.get("shards"), data.get("sources"))
    except ValueError as error:
        yield str(error)
        return
    opened = {}
    for name, source in given.items():
        setting = "data.shards" if name == ONLY and not data.get("sources") else f"data.sources.{name}.shards"
        try:
            if not (isinstance(source["shards"], Mapping) and "_target_" in source["shards"]):
                opened[name] = open_shards(source["shards"])
                _look(opened[name])
        except (ValueError, OSError) as error:
            yield f"{setting}: {error}"
    try:
        sizes = {name: len(opened.get(name, (0,))) for name in given}
        knots_of(given, sizes, data.get("weights"), data.get("schedule"))
    except ValueError as error:
        yield str(error)


def _look(shards: Shards) -> None:
    """Raises ValueError for files that are not there, and where the first shards have no sample."""
    if missing := list(_missing(shards)):
        raise ValueError(f"{len(missing)} of {len(shards)} shards do not exist: {some(missing)}")
    fault: ValueError | None = None
    for shard in range(min(TRIES, len(shards))):
        try:
            if next(shards.read(shard), None) is not None:
                return
        except ShardError as error:
            fault = fault or error
    raise ValueError(f"there is no sample in {min(TRIES, len(shards))} of {len(shards)} shards" + (f": {fault}" if fault else ""))


def _missing(shards: Shards) -> Iterator[str]:
    """Names of local files that are not there; each folder is listed once."""
    if not isinstance(shards, TarShards | ParquetShards):
        return
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for name in islice(shards.names, LOOKED_FOR):
        if protocol_of(name) is None:
            folder, _, file = name.rpartition("/")
            folders[folder or ("/" if name.startswith("/") else ".")].append(file)
    for folder, files in folders.items():
        here = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        yield from (f"{folder}/{file}" for file in files if file not in here)
