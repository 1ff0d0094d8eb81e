"""Settings of training data from shards, and their faults before any model is built.

Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.choices import BY_SIZE
from lightning_internvl.data.files.records import PARQUET
from lightning_internvl.data.shards.names import without_query
from lightning_internvl.data.shards.tables import ParquetShards
from lightning_internvl.data.shards.tar import Shards, TarShards
from lightning_internvl.messages import check_number, did_you_mean

ONLY = "shards"  # the name of a source that has none
SOURCE_KEYS = ("shards", "weight", "samples", "language")
LOOKED_FOR = 200_000  # shards whose files are looked for before the start; of more the first ones
# The shell and Hydra both want quotes around braces
EXAMPLE = "'data.shards=\"DIR/{00000..00099}.tar\"'"


def sources_of(shards: Any, sources: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The sources by name, whichever way they are given.

    Raises:
        ValueError: for none, both, or a setting that a source does not have.
    """
    if (shards is None) == (not sources):
        given = "both data.shards and data.sources are" if shards is not None else "no shards are"
        several = "data.sources={NAME: {shards: ..., weight: 2}}"
        raise ValueError(f"{given} given; give {EXAMPLE}, or several as {several}")
    found = {ONLY: {"shards": shards}} if sources is None or shards is not None else {}
    for name, source in (sources or {}).items():
        source = dict(source) if isinstance(source, Mapping) and "_target_" not in source else {"shards": source}
        if unknown := [key for key in source if key not in SOURCE_KEYS]:
            nothing = f"there is no setting {unknown[0]!r}"
            raise ValueError(f"data.sources.{name}: {nothing}; {did_you_mean(unknown[0], SOURCE_KEYS)}")
        if source.get("shards") is None:
            raise ValueError(f"data.sources.{name} has no shards; give data.sources.{name}.shards=...")
        found[name] = source
    return found


def open_shards(given: Any) -> Shards:
    """The shards of a source: an object, or paths, URLs and patterns of tar or parquet files.

    Raises:
        ValueError: for a pattern that is broken or matches nothing, or where a package is missing.
    """
    if hasattr(given, "read"):
        return given
    first = given if isinstance(given, str | Path) else next(iter(given), "")
    return (ParquetShards if without_query(str(first)).endswith(PARQUET) else TarShards)(given)


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
            choices = f"null, {', '.join(BY_SIZE)}, numbers by name"
            raise ValueError(f"data.weights={weights!r} is not known; valid choices: {choices}")
        known = [name for name, source in given.items() if source.get("samples")]
        if known and len(known) < len(given):
            others = ", ".join(name for name in given if name not in known)
            as_others = f"as {', '.join(known)} do"
            raise ValueError(f"data.weights={weights}: {others} must say their samples too, {as_others}")
        numbers = {name: source["samples"] for name, source in given.items()} if known else sizes
        return {name: float(number) ** BY_SIZE[weights] for name, number in numbers.items()}
    found = {} if weights is None else dict(weights)
    if weights is None:
        found = {name: source.get("weight", 1) for name, source in given.items()}
    if unknown := [name for name in found if name not in given]:
        nothing = f"there is no source {unknown[0]!r}"
        raise ValueError(f"data.weights: {nothing}; {did_you_mean(unknown[0], given)}")
    if lacking := [name for name in given if name not in found]:
        raise ValueError(f"data.weights has none for {', '.join(lacking)}; 0 leaves a source out")
    for name, weight in found.items():
        check_number(f"data.weights: {name}", weight, least=0)
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
    knots = schedule if isinstance(schedule, list) else [None]
    if not all(isinstance(knot, Mapping) and set(knot) == {"step", "weights"} for knot in knots):
        example = "[{step: 0, weights: {NAME: 1}}]"
        raise ValueError(f"data.{schedule=} is no list of steps, as in {example}")
    steps = [knot["step"] for knot in schedule]
    whole = all(isinstance(step, int) for step in steps)
    if not whole or steps[:1] != [0] or steps != sorted(set(steps)):
        raise ValueError(f"the steps of data.schedule start at 0 and rise, but they are {steps}")
    found = [weights_of(given, sizes, knot["weights"]) for knot in schedule]
    return [{"step": step, "weights": own} for step, own in zip(steps, found, strict=True)]
