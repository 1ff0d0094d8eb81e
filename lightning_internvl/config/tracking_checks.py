"""Settings of `callbacks.tracking` that a command line gives, and that cannot have an effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_internvl.messages import ConfigError

Config = Mapping[str, Any]
OURS = "lightning_internvl."
PLACE = "callbacks.tracking"
BY_METRIC = ("lowest", "take_best", "patience")
HOLD_OUT = "nothing is held out of this data; give data.validation=0.1 (a share of it) or a file"
NOTHING = "this data has no held-out records; data of files has, with data.validation=0.1"
WHEN = f"nothing is measured while a stage trains; give {PLACE}.every_n_steps=N or times=N too"
WHICH = f"no weights are compared; give {PLACE}.best=METRIC too"


def check_tracking(config: Config, stages: Sequence[Config], texts: Mapping[str, str]) -> None:
    """Refuse settings without an effect.

    Args:
        config: resolved, as plain containers, and not checked yet.
        stages: those that train.
        texts: the words of the command line, by the name of the setting below `PLACE`.

    Raises:
        ConfigError: naming the settings, and what would let them have one.
    """
    if faults := list(_faults(config, stages, texts)):
        raise ConfigError(faults)


def _faults(config: Config, stages: Sequence[Config], texts: Mapping[str, str]) -> Iterator[str]:
    node = (config.get("callbacks") or {}).get("tracking") or {}
    reasons = [_nothing_to_measure_on(config, stage) for stage in stages]
    timed = node.get("every_n_steps") is not None or node.get("times") is not None
    for name, text in texts.items():
        if reasons and all(reasons):
            yield f"{text} has no effect: {reasons[0]}"
        elif not timed and name != "best":  # which says so itself
            yield f"{text} has no effect: {WHEN}"
        elif node.get("best") is None and name in BY_METRIC:
            yield f"{text} has no effect: {WHICH}"


def _nothing_to_measure_on(config: Config, stage: Config) -> str:
    """Why a stage cannot be measured while it trains; nothing if it can."""
    data, own = config.get("data") or {}, stage.get("datasets") or {}
    held_out = {**(data.get("held_out") or {}), **(own.get("held_out") or {})}
    return "" if "_target_" in held_out else nothing_held_out(config, stage)


def nothing_held_out(config: Config, stage: Config) -> str:
    """Why a stage has no held-out records of the user's own data; nothing if it has."""
    data, own, kind = config.get("data") or {}, stage.get("datasets") or {}, str(stage.get("data"))
    dataset = {**(data.get(kind) or {}), **(own.get(kind) or {})}
    # of a dataset of the user's own nothing is known here
    if not str(dataset.get("_target_")).startswith(OURS):
        return ""
    if "validation" not in dataset:
        return NOTHING
    return "" if dataset["validation"] is not None else HOLD_OUT
