"""The settings of one stage, complete."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_internvl.choices import BLOCKWISE, PARTS, Config, block_settings

LIGHT = ("peft", "quantization")  # groups with a setting for each part
STAGE_KEYS = (
    "module", "parts", "objectives", "max_steps", "batch_size", "new", "dropped", "data", "collate", "evaluation", "samples",
    "encoder", "middleware", "decoder", "peft", "quantization", "optimizer", "scheduler",
    "trainer", "datasets", "feature_cache", *BLOCKWISE,
)  # fmt: skip


@dataclass(frozen=True)
class DataSettings:
    """The data group: datasets by what they give, how samples become batches, and what is held out.

    Attributes:
        pairs, chats, labels: datasets of pictures with captions, conversations or classes.
        processor: of pictures; `eval_processor` are changes to it for evaluation, or another one.
        pairs_collate, chats_collate: settings of the collators.
        image_token, video_token: placeholders in the text of the decoder.
        tokenizer: of a decoder that is inherited, in place of its own.
        endless: whether the data has no end; else epochs follow each other.
        max_bad_fraction: the share of samples that may be unusable.
        validate: whether the command only checks the data.
    """

    processor: Config
    image_token: str
    endless: bool
    num_workers: int
    pairs: Config | None = None
    chats: Config | None = None
    labels: Config | None = None
    held_out: Config | None = None
    eval_processor: Config | None = None
    pairs_collate: Config = field(default_factory=dict)
    chats_collate: Config = field(default_factory=dict)
    video_token: str | None = None
    tokenizer: str | None = None
    packing: str | bool | None = None
    packing_tokens: int | None = None
    packing_tiles: int | None = None
    packing_window: int | None = None
    max_bad_fraction: float = 0.0
    validate: bool = False


@dataclass(frozen=True)
class SampleSettings:
    """How the stage is shown: the embedding that is compared (`c`, `g`) and the part that writes."""

    mode: str = "c"
    writer: str | None = None


@dataclass(frozen=True)
class CacheSettings:
    """Where features of a frozen encoder are kept, and the most GiB that they may take."""

    where: str
    gib: float
    path: str | None = None


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
