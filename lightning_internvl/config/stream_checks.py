"""Faults of the settings of data from shards."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from lightning_internvl.data.bad_samples import TRIES
from lightning_internvl.data.shards.names import protocol_of
from lightning_internvl.data.shards.sources import LOOKED_FOR, ONLY, knots_of, open_shards, sources_of
from lightning_internvl.data.shards.tables import ParquetShards
from lightning_internvl.data.shards.tar import ShardError, Shards, TarShards
from lightning_internvl.messages import first_of, number_faults


def stream_faults(data: Mapping[str, Any], processes: int | None, look: bool) -> Iterator[str]:
    """What is wrong with a data group of shards.

    Args:
        processes: of the run; None where that is not known yet.
        look: whether to look for the shards: for each file, and in each source for a sample.
    """
    for name in ("lanes", "turns", "shuffle", "run"):
        if faults := list(number_faults(f"data.{name}", data.get(name), above=0, whole=True)):
            yield from faults
            return
    lanes, turns, workers = data["lanes"], data["turns"], data["num_workers"]
    if workers == "auto":
        yield f"data.num_workers=auto: readers of shards need a number, which divides data.turns={turns}"
    elif workers and turns % workers:
        fitting = ", ".join(str(n) for n in range(turns + 1) if n == 0 or turns % n == 0)
        yield (
            f"data.num_workers={workers} processes cannot share data.turns={turns} evenly; fitting "
            f"numbers: {fitting}; a new run may have more turns"
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
        alone = name == ONLY and not data.get("sources")
        setting = "data.shards" if alone else f"data.sources.{name}.shards"
        try:
            if not (isinstance(source["shards"], Mapping) and "_target_" in source["shards"]):
                opened[name] = open_shards(source["shards"])
                _check_shards(opened[name])
        except (ValueError, OSError) as error:
            yield f"{setting}: {error}"
    try:
        sizes = {name: len(opened.get(name, (0,))) for name in given}
        knots_of(given, sizes, data.get("weights"), data.get("schedule"))
    except ValueError as error:
        yield str(error)


def _check_shards(shards: Shards) -> None:
    """Raises ValueError for files that are not there, and where the first shards have no sample."""
    if missing := list(_missing_files(shards)):
        raise ValueError(f"{len(missing)} of {len(shards)} shards do not exist: {first_of(missing)}")
    fault: ValueError | None = None
    for shard in range(min(TRIES, len(shards))):
        try:
            if next(shards.read(shard), None) is not None:
                return
        except ShardError as error:
            fault = fault or error
    why = f": {fault}" if fault else ""
    raise ValueError(f"there is no sample in {min(TRIES, len(shards))} of {len(shards)} shards{why}")


def _missing_files(shards: Shards) -> Iterator[str]:
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
