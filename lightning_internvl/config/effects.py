"""Settings of the command line that nothing in this run reads: each is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from lightning_internvl.choices import GIVEN_PARTS, INHERITED, PARTS, SWEEP, embeds_pairs, is_step
from lightning_internvl.config.given import DELETED, VALUE, Given, Path
from lightning_internvl.config.signatures import attributes_of

Config = Mapping[str, Any]
OURS = "lightning_internvl."
TRACKING = "callbacks.tracking"
PLANNED = ("device_memory", "device_tflops", "device_utilisation", "price_per_hour")
BY_METRIC = ("lowest", "take_best", "patience")  # settings of weights that are compared
AS_STARTED = "the model is taken as init_from has it; a recipe that builds its parts changes them"
HOLD_OUT = "nothing is held out of this data; give data.validation=0.1 (a share of it) or a file"
NOTHING = "this data has no held-out records; data of files has, with data.validation=0.1"
WHEN = f"nothing is measured while a stage trains; give {TRACKING}.every_n_steps=N or times=N too"
NOT_TAKEN = "the pipeline begins with a filter, which is never taken from another run, nor is what follows it"
WHICH = f"no weights are compared; give {TRACKING}.best=METRIC too"


class _Run(NamedTuple):
    """What rules look at: the configuration, the stages of its pipeline, and those that train."""

    config: Config
    stages: dict[str, Config]
    trained: list[str]

    @property
    def shown(self) -> str:
        return f"pipeline=[{', '.join(self.stages)}]"

    def nowhere(self, why: Callable[[Config, Config], str]) -> str:
        """Why something is in no stage that trains; nothing if it is in one."""
        reasons = [why(self.config, self.stages[name]) for name in self.trained]
        return reasons[0] if all(reasons) and reasons else ""


def without_effect(config: Config, given: Iterable[Given], trained: list[str]) -> Iterator[str]:
    """What the command line gives in vain, as faults.

    Args:
        config: resolved, as plain containers; a pipeline that is not valid is left to its check.
        trained: the stages of the pipeline that train.
    """
    pipeline, stages = config.get("pipeline"), config.get("stages") or {}
    if not isinstance(pipeline, list) or not pipeline or any(name not in stages for name in pipeline):
        return
    run = _Run(config, {n: stages[n] for n in pipeline if isinstance(stages[n], Mapping)}, trained)
    for one in [one for one in given if one.kind != DELETED]:
        rule = RULES.get(one.path[:1]) or RULES.get(one.path[:2])
        if why := rule and rule(run, one):
            yield f"{one.text} has no effect: {why}"


def _stage(run: _Run, one: Given) -> str:
    name = "".join(one.path[1:2])
    if name not in run.config["stages"] or name in run.stages:
        return ""
    return f"{run.shown} does not run {name}; name it there, or leave this out"


def _part(run: _Run, one: Given) -> str:
    part, lists = one.path[0], [stage.get("parts") for stage in run.stages.values()]
    if any((not isinstance(parts, list) and parts != INHERITED) or part in parts for parts in lists):
        return ""
    if INHERITED in lists:
        if part in GIVEN_PARTS and any(swaps_a_part(stage) for stage in run.stages.values()):
            return ""
        return "" if one.path[1:] == ("pretrained",) else AS_STARTED
    having = _stages_with(run, lambda stage: part in (stage.get("parts") or ()))
    others = f"stages with one: {having}" if having else "choose a recipe of a system that has one"
    return f"no stage of {run.shown} has a {part}; {others}"


def _data(kind: str, run: _Run, one: Given) -> str:
    if any(stage.get("data") == kind for stage in run.stages.values()):
        return ""
    reading = _stages_with(run, lambda stage: stage.get("data") == kind) or f"those with data: {kind}"
    return f"no stage of {run.shown} reads {kind}; stages that do: {reading}"


def _chats_collate(run: _Run, one: Given) -> str:
    """Rows of a decoder that embeds pairs are made by these settings too."""
    embeds = any(map(embeds_pairs, run.stages.values()))
    return "" if embeds else _data("chats", run, one)


def _pairs_collate(run: _Run, one: Given) -> str:
    reading = {name: stage for name, stage in run.stages.items() if not embeds_pairs(stage)}
    return _data("pairs", run._replace(stages=reading), one)


def _stages_with(run: _Run, condition: Callable[[Config], bool]) -> str:
    return ", ".join(name for name, stage in run.config["stages"].items() if condition(stage or {}))


def swaps_a_part(stage: Config) -> bool:
    """Whether a stage replaces a part of where it starts (see `stages.transplant`)."""
    target = (stage.get("module") or {}).get("_target_")
    return bool(target and attributes_of(target).get("swaps_a_part"))


def _token(run: _Run, one: Given) -> str:
    return AS_STARTED if all(stage.get("parts") == INHERITED for stage in run.stages.values()) else ""


def _training(run: _Run, one: Given) -> str:
    return "" if run.trained else f"{run.shown} trains nothing; name a stage that does"


def _reuse(run: _Run, one: Given) -> str:
    first = run.stages[next(iter(run.stages))]
    return _training(run, one) or (NOT_TAKEN if one.value not in (False, SWEEP) and is_step(first) else "")


def _planned(run: _Run, one: Given) -> str:
    return "" if run.config.get("plan") else "it is for plan=true"


def _validation(run: _Run, one: Given) -> str:
    return run.nowhere(_nothing_held_out) if one.path[2:] else ""


def _tracking(run: _Run, one: Given) -> str:
    node = (run.config.get("callbacks") or {}).get("tracking") or {}
    timed = node.get("every_n_steps") is not None or node.get("times") is not None
    if not one.path[2:] or one.kind != VALUE or one.value is None:
        return ""
    if why := run.nowhere(_nothing_to_measure_on):
        return why
    if not timed and one.path[2] != "best":  # which says so itself
        return WHEN
    return WHICH if node.get("best") is None and one.path[2] in BY_METRIC else ""


def _nothing_to_measure_on(config: Config, stage: Config) -> str:
    """Why a stage cannot be measured while it trains; nothing if it can."""
    measured = "_target_" in _dataset(config, stage, "held_out")
    return "" if measured else _nothing_held_out(config, stage)


def _nothing_held_out(config: Config, stage: Config) -> str:
    """Why a stage has no held-out records of the user's own data; nothing if it has."""
    dataset = _dataset(config, stage, str(stage.get("data")))
    if not str(dataset.get("_target_")).startswith(OURS):
        return ""  # of a dataset of the user's own nothing is known here
    if "validation" not in dataset:
        return NOTHING
    return "" if dataset["validation"] is not None else HOLD_OUT


def _dataset(config: Config, stage: Config, kind: str) -> Config:
    common, own = config.get("data") or {}, stage.get("datasets") or {}
    return {**(common.get(kind) or {}), **(own.get(kind) or {})}


# by the first words of a setting: why it has no effect in a run; nothing if it may have one
RULES: dict[Path, Callable[[_Run, Given], str]] = {
    ("stages",): _stage,
    **{(part,): _part for part in PARTS},
    **{("data", kind): partial(_data, kind) for kind in ("pairs", "chats", "labels")},
    ("data", "pairs_collate"): _pairs_collate,
    ("data", "chats_collate"): _chats_collate,
    **{("data", f"packing{what}"): partial(_data, "chats") for what in ("", "_tokens", "_tiles", "_window")},
    ("data", "image_token"): _token,
    ("data", "video_token"): _token,
    **{(word,): _training for word in ("optimizer", "scheduler", "max_steps", "epochs", "batch_size")},
    **{(word,): _planned for word in PLANNED},
    ("reuse",): _reuse,
    ("callbacks", "validation"): _validation,
    ("callbacks", "tracking"): _tracking,
}
