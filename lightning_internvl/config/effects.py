"""Settings of the command line that nothing in this run reads: each is refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning_internvl.choices import INHERITED, PARTS
from lightning_internvl.config.given import DELETED, Given
from lightning_internvl.config.tracking_checks import nothing_held_out

Config = Mapping[str, Any]
TRAINING = ("optimizer", "scheduler", "max_steps", "epochs", "batch_size")  # of stages that train
PLANNED = ("device_memory", "device_tflops", "device_utilisation", "price_per_hour")
TOKENS = (("data", "image_token"), ("data", "video_token"))  # of the model's vocabulary
AS_STARTED = "the model is taken as init_from has it; a recipe that builds its parts changes them"
READ_AS = {  # settings of the data group that one kind of data has
    **{kind: kind for kind in ("pairs", "chats", "labels")},
    "pairs_collate": "pairs",
    "chats_collate": "chats",
    "packing": "chats",
    "packing_tokens": "chats",
    "packing_tiles": "chats",
    "packing_window": "chats",
}


def without_effect(config: Config, given: Iterable[Given], trained: list[str]) -> Iterator[str]:
    """What the command line gives in vain, as faults.

    Args:
        config: resolved, as plain containers; a pipeline that is not valid is left to its check.
        trained: the stages of the pipeline that train.
    """
    pipeline, stages = config.get("pipeline"), config.get("stages") or {}
    if not isinstance(pipeline, list) or not pipeline or any(name not in stages for name in pipeline):
        return
    run = {name: stages[name] for name in pipeline if isinstance(stages[name], Mapping)}
    shown = f"pipeline=[{', '.join(run)}]"
    for one in given:
        why = None
        if one.kind == DELETED:
            continue
        if one.path[0] == "stages" and one.path[1:2] and one.path[1] in stages and one.path[1] not in run:
            why = f"{shown} does not run {one.path[1]}; name it there, or leave this out"
        elif one.path[0] in PARTS:
            why = _unread_part(one.path[0], shown, run, stages)
        elif one.path[0] == "data" and one.path[1:2] and one.path[1] in READ_AS:
            why = _unread_data(READ_AS[one.path[1]], shown, run, stages)
        elif one.path in TOKENS and all(stage.get("parts") == INHERITED for stage in run.values()):
            why = AS_STARTED
        elif one.path[0] in TRAINING and not trained:
            why = f"{shown} trains nothing; name a stage that does"
        elif one.path[:2] == ("callbacks", "validation") and one.path[2:] and trained:
            reasons = [nothing_held_out(config, run[name]) for name in trained]
            why = reasons[0] if all(reasons) else None
        elif one.path[0] in PLANNED and not config.get("plan"):
            why = "it is for plan=true"
        if why:
            yield f"{one.text} has no effect: {why}"


def _unread_part(part: str, shown: str, run: Config, stages: Config) -> str | None:
    lists = {name: stage.get("parts") for name, stage in run.items()}
    if any((not isinstance(parts, list) and parts != INHERITED) or part in parts for parts in lists.values()):
        return None
    if INHERITED in lists.values():
        return AS_STARTED
    having = [name for name, stage in stages.items() if part in ((stage or {}).get("parts") or ())]
    others = f"; {', '.join(having)} has one" if having else "; choose a recipe of a system that has one"
    return f"no stage of {shown} has a {part}{others}"


def _unread_data(kind: str, shown: str, run: Config, stages: Config) -> str | None:
    if any(stage.get("data") == kind for stage in run.values()):
        return None
    reading = [name for name, stage in stages.items() if (stage or {}).get("data") == kind]
    others = f"; {', '.join(reading)} does" if reading else f"; one with data: {kind} does"
    return f"no stage of {shown} reads {kind}{others}"
