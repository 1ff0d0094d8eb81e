"""The settings of one stage, complete: made once from the configuration of a run, and handed on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lightning_internvl.choices import BLOCKWISE, EMBEDDING, PACKINGS, PARTS, Config, block_settings
from lightning_internvl.config.hardware import data_workers

LIGHT = ("peft", "quantization")  # groups with a setting for each part
# that a stage may change
COMMON = ("encoder", "middleware", "decoder", "optimizer", "scheduler", "trainer", *LIGHT)
STAGE_KEYS = (
    "module", "parts", "objectives", "max_steps", "epochs", "batch_size", "new", "dropped",
    "data", "collate", "evaluation", "samples", *COMMON, "datasets", "feature_cache", *BLOCKWISE,
)  # fmt: skip


@dataclass(frozen=True)
class PartsSettings:
    """The parts of a model, nodes with `_target_`, and their words for pictures and videos.

    Attributes:
        decoder: None without one.
        objectives: by name.
        peft, quantization: adapters, and formats of frozen weights, by part; parts without any are
            left out.
    """

    encoder: Config
    middleware: Config
    decoder: Config | None
    objectives: dict[str, Config]
    image_token: str
    video_token: str | None = None
    peft: Config = field(default_factory=dict)
    quantization: Config = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """As hand-offs keep it: what is not set is not there, but for a decoder that is not."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if value or name in (*PARTS, "objectives")}


@dataclass(frozen=True)
class DataSettings:
    """The data group: datasets by what they give, how samples become batches, and what is held out.

    Attributes:
        pairs, chats, labels: datasets of pictures with captions, conversations or classes.
        processor: of pictures; `eval_processor` are changes to it for evaluation, or another one.
        jpeg_quality: the least and the most quality of JPEG through which pictures go in training.
        pairs_collate, chats_collate: settings of the collators.
        image_token, video_token: placeholders in the text of the decoder.
        tokenizer: of a decoder that is inherited, in place of its own.
        endless: whether the data has no end; else epochs follow each other.
        max_bad_fraction: the share of samples that may be unusable.
        max_sample_seconds: the longest time that one sample may take; None: any.
        max_unread_fraction: the share of records that may hold something that is not read.
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
    jpeg_quality: list[int] | None = None
    pairs_collate: Config = field(default_factory=dict)
    chats_collate: Config = field(default_factory=dict)
    video_token: str | None = None
    tokenizer: str | None = None
    packing: str | bool | None = None
    packing_tokens: int | None = None
    packing_tiles: int | None = None
    packing_window: int | None = None
    max_bad_fraction: float = 0.0
    max_sample_seconds: float | None = None
    max_unread_fraction: float = 1.0
    validate: bool = False

    @property
    def measured_on(self) -> Config | None:
        """The node of the held-out data; None without, even if debug=fast gave sizes for it."""
        return self.held_out if "_target_" in (self.held_out or {}) else None

    def dataset(self, kind: str) -> Config:
        """The node of a dataset.

        Raises:
            ValueError: if the group has none of this kind.
        """
        offers = {one: node for one in ("pairs", "chats", "labels") if (node := getattr(self, one))}
        if kind not in offers:
            known = f"it offers {', '.join(offers)}"
            raise ValueError(f"this data group has no {kind!r}; {known}; choose another with data=GROUP")
        return offers[kind]


@dataclass(frozen=True)
class TrainerSettings:
    """What is read of the trainer's settings; `node` has them all, as its class takes them."""

    node: Config
    accelerator: str = "auto"
    devices: Any = 1
    num_nodes: int = 1
    precision: Any = None
    accumulate_grad_batches: int = 1
    max_time: Any = None
    plugins: Any = None

    @classmethod
    def of(cls, node: Config) -> TrainerSettings:
        """From the node of a trainer."""
        return cls(node, **_known(cls, node))


@dataclass(frozen=True)
class SampleSettings:
    """How the stage is shown: the embedding to compare (`c`, `g`), the part that writes."""

    mode: Literal["c", "g"] = "c"
    writer: Literal["middleware", "decoder"] | None = None


@dataclass(frozen=True)
class CacheSettings:
    """Where features of a frozen encoder are kept (memory or disk), the most GiB that they may
    take, and a disk's folder."""

    where: str
    gib: float
    path: str | None = None


@dataclass(frozen=True)
class StageSettings:
    """One stage's settings, complete: its own over the common ones. Nodes with `_target_` are as
    their classes take them.

    Attributes:
        reads: which dataset of the data group it trains on: pairs, chats or labels.
        collate: changes to the collator of what it reads; `processor` in it changes how pictures
            are prepared.
        new, dropped: patterns of names that may be missing in the weights it starts from, and that
            may be left over.
        max_steps: 0 as long as the length is known in epochs alone (see `training.length`).
        epochs: from which `max_steps` was made; None where that was given.
        evaluation: nodes of its tasks by name; None leaves one out.
        activation_checkpointing, compile: by part.
        callbacks, loggers: nodes by name; None leaves one out.
        device_memory: GiB of one device, for the plan; None: of this machine's, if it has as many.
    """

    name: str
    module: Config
    reads: str
    parts: PartsSettings
    data: DataSettings
    collate: Config
    optimizer: Config
    scheduler: Config
    trainer: TrainerSettings
    strategy: Config
    max_steps: int
    batch_size: int
    seed: int
    new: list[str]
    dropped: list[str]
    evaluation: dict[str, Config | None]
    samples: SampleSettings
    feature_cache: CacheSettings | None
    activation_checkpointing: Config
    compile: Config
    callbacks: dict[str, Config | None]
    loggers: dict[str, Config | None]
    epochs: float | None = None
    attention: str = "auto"
    device_memory: float | None = None

    @property
    def embeds(self) -> bool:
        """Whether pairs are read by the decoder, which embeds them."""
        return EMBEDDING in self.parts.objectives

    @property
    def packing(self) -> str | None:
        """How batches are made: packed, bucketed, or None (as samples come)."""
        return PACKINGS[self.data.packing] if self.reads == "chats" else None


def stage_settings(config: Mapping[str, Any], name: str) -> StageSettings:
    """One stage's settings from the configuration of a run.

    A stage may carry a change to any common group (`optimizer: {lr: 1e-4}`); one with a `_target_`
    replaces the group. Changes to the data group are called `datasets`, because `data` says which
    of its kinds a stage reads.
    """
    return settings_of_stage(config, name, config["stages"][name])


def settings_of_stage(config: Mapping[str, Any], name: str, stage: Mapping[str, Any]) -> StageSettings:
    """The settings of a stage that is given, and need not stand in the configuration."""
    complete: Config = copy.deepcopy(dict(stage))
    for group in COMMON:
        own, common = stage.get(group) or {}, copy.deepcopy(config.get(group) or {})
        complete[group] = own if "_target_" in own else merged(common, own)
    stage = complete
    data = _data_of(config["data"], stage.get("datasets") or {})
    data["num_workers"] = data_workers(data["num_workers"], stage["trainer"])
    cache = stage.get("feature_cache")
    return StageSettings(
        name=name,
        module=stage.get("module") or {},
        reads=stage["data"],
        parts=_parts_of(complete, config["data"]),
        data=DataSettings(**_known(DataSettings, data)),
        collate=stage.get("collate") or {},
        optimizer=stage["optimizer"],
        scheduler=stage["scheduler"],
        trainer=TrainerSettings.of(stage["trainer"]),
        strategy=config.get("strategy") or {},
        max_steps=min(_lengths(config, stage), default=0),
        epochs=stage.get("epochs"),
        batch_size=stage["batch_size"],
        seed=config["seed"],
        new=stage.get("new") or [],
        dropped=stage.get("dropped") or [],
        evaluation=stage.get("evaluation") or {},
        samples=SampleSettings(**_known(SampleSettings, stage.get("samples") or {})),
        feature_cache=CacheSettings(**cache) if cache else None,
        callbacks=config.get("callbacks") or {},
        loggers=config.get("logger") or {},
        attention=config.get("attention") or "auto",
        device_memory=config.get("device_memory"),
        **block_settings(config, stage),
    )


def _lengths(config: Mapping[str, Any], stage: Mapping[str, Any]) -> list[int]:
    """The steps that a stage may have, of which the fewest hold; none if it is given in epochs."""
    own, most = stage.get("max_steps"), config.get("max_steps")
    return [steps for steps in (own, most) if steps] if own else []


def _parts_of(stage: Config, data: Mapping[str, Any]) -> PartsSettings:
    parts: Config = {part: stage[part] if part in stage["parts"] else None for part in PARTS}
    light: Config = {kind: {part: own for part, own in stage[kind].items() if own and parts.get(part)} for kind in LIGHT}
    return PartsSettings(
        **parts,
        objectives=stage["objectives"],
        image_token=data["image_token"],
        video_token=data.get("video_token"),
        **light,
    )


def _data_of(common: Config, change: Mapping[str, Any]) -> Config:
    """The data group with a stage's changes; a dataset with `_target_` replaces another."""
    filled = merged(copy.deepcopy(dict(common)), {key: value for key, value in change.items() if not _is_object(value)})
    return filled | {key: value for key, value in change.items() if _is_object(value)}


def _known(kind: type, node: Mapping[str, Any]) -> Config:
    """What of a mapping are fields of a dataclass; null stands for their defaults."""
    optional = {one.name for one in fields(kind) if one.default is None}
    found = {one.name: node[one.name] for one in fields(kind) if one.name in node and one.name != "node"}
    return {name: value for name, value in found.items() if value is not None or name in optional}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def merged(common: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """A stage's settings over the common ones, at any depth."""
    found = dict(common or {})
    for key, value in (own or {}).items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found
