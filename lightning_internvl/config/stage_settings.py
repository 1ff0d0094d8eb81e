"""The settings of one stage, complete."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning_internvl.choices import PARTS, Config, block_settings

LIGHT = ("peft", "quantization")  # groups with a setting for each part


def stage_settings(config: Mapping[str, Any], name: str) -> Config:
    """One stage's settings, complete: its own over the common ones.

    A stage may carry a change to any common group (`optimizer: {lr: 1e-4}`); one with a `_target_` replaces the group. Changes
    to the data group are called `datasets`, because `data` says which of its kinds a stage reads.
    """
    stage = copy.deepcopy(dict(config["stages"][name]))
    stage["max_steps"] = min(stage["max_steps"], config.get("max_steps") or stage["max_steps"])
    for group in ("encoder", "middleware", "decoder", "optimizer", "scheduler", "trainer", *LIGHT):
        own, common = stage.get(group) or {}, copy.deepcopy(config.get(group) or {})
        stage[group] = own if "_target_" in own else merged(common, own)
    stage |= block_settings(config, stage)
    parts = {part: stage.pop(part) if part in stage["parts"] else None for part in PARTS}
    parts |= {"objectives": stage.pop("objectives"), "image_token": config["data"]["image_token"]}
    parts |= {"video_token": config["data"]["video_token"]} if config["data"].get("video_token") else {}
    for kind in LIGHT:
        own = {part: value for part, value in stage.pop(kind).items() if value and parts.get(part)}
        parts |= {kind: own} if own else {}
    data = _data_of(config["data"], stage.pop("datasets", None) or {})
    return stage | {"parts": parts, "data_group": data, "callbacks": config["callbacks"], "seed": config["seed"]}


def _data_of(common: Config, change: Mapping[str, Any]) -> Config:
    """The data group with a stage's changes; a dataset with a `_target_` takes the place of another."""
    filled = merged(copy.deepcopy(dict(common)), {key: value for key, value in change.items() if not _is_object(value)})
    return filled | {key: value for key, value in change.items() if _is_object(value)}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def merged(common: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """A stage's settings over the common ones, at any depth."""
    found = dict(common or {})
    for key, value in (own or {}).items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found
