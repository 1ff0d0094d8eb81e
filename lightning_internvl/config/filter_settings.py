"""The settings of a filter, complete, and the configuration of the stages behind one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_internvl.choices import Config, is_step
from lightning_internvl.config.filter_checks import LANGUAGES, SIMILARITY, needs_model
from lightning_internvl.config.stage_settings import StageSettings, TrainerSettings, settings_of_stage
from lightning_internvl.data.shards.sources import ONLY, sources_of

GIVEN = ("shards", "sources")  # the settings of data that say what is read


@dataclass(frozen=True)
class FilterSettings:
    """One filter of a run.

    Attributes:
        rules: what a pair must be like to be kept.
        scores_from: an earlier filter over the same shards, whose scores are taken.
        mode: the embedding that is compared with captions: c or g.
        pairs: the node of the dataset whose shards are filtered.
        max_bad_fraction: the share of pairs that may be unusable.
        scorer: the model that compares pictures with captions, and how it reads; its weights are
            those of the stage before.
        needs_model: whether there is anything for it to compare.
    """

    name: str
    rules: Config
    scores_from: str | None
    mode: str
    engine: str
    batch_size: int
    num_workers: int
    pairs: Config
    max_bad_fraction: float
    scorer: StageSettings
    needs_model: bool

    @property
    def trainer(self) -> TrainerSettings:
        """The trainer of the run, which says where to compute."""
        return self.scorer.trainer

    @property
    def attention(self) -> str:
        """The attention of the model that compares."""
        return self.scorer.attention

    @property
    def needs_language(self) -> bool:
        """Whether a rule asks for the language of captions."""
        return self.rules.get(LANGUAGES[1]) is not None

    @property
    def shares_by_language(self) -> bool:
        """Whether a rule keeps something of each language."""
        share = (self.rules.get(SIMILARITY) or {}).get("keep_share")
        return share is not None or self.rules.get("same_picture") is not None


def filter_settings(config: Config, name: str) -> FilterSettings:
    """A filter's settings from the configuration of a run; its data is what the filter reads."""
    stage = config["stages"][name]
    model = {"max_steps": 1, "objectives": {}, **settings_before(name, config), **stage}
    scorer = settings_of_stage(config, name, model)
    return FilterSettings(
        name=name,
        rules=stage["rules"],
        scores_from=stage["scores_from"],
        mode=stage["mode"],
        engine=stage["engine"],
        batch_size=stage["batch_size"],
        num_workers=stage["num_workers"],
        pairs=config["data"].get("pairs") or {},
        max_bad_fraction=config["data"].get("max_bad_fraction") or 0.0,
        scorer=scorer,
        needs_model=needs_model(stage),
    )


def settings_before(name: str, config: Config) -> Config:
    """What the stage before a filter says of its parts and of how it reads pairs, so that the
    filter looks as that stage did."""
    stages, pipeline = config["stages"], config["pipeline"]
    earlier = [stages[one] for one in pipeline[: pipeline.index(name)] if not is_step(stages[one])]
    before = earlier[-1] if earlier else {}
    found = {key: before[key] for key in ("encoder", "middleware", "datasets") if before.get(key)}
    reads = before.get("collate") or {}
    kept = reads if before.get("data") == "pairs" else {key: reads[key] for key in ("processor",) if key in reads}
    return {**found, "collate": {**kept, "tasks": ["itc"]}}


def shard_list(folder: Path, source: str) -> Path:
    """The list of the new shards of a source."""
    return folder / ("shards.txt" if source == ONLY else f"shards.{source}.txt")


def with_kept_shards(config: Config, folder: Path, kept: Mapping[str, int]) -> Config:
    """A configuration in which all that read what a filter has read reads what it has kept instead.

    Args:
        folder: of the filter.
        kept: pairs by source.
    """
    data = dict(config["data"])
    before = _given(data.get("pairs"))
    assert before is not None  # as the checks have seen
    after: Config = {"shards": None, "sources": None}
    if before["shards"] is not None:
        after["shards"] = str(shard_list(folder, ONLY))
    else:
        given = sources_of(None, before["sources"])
        found = {name: {"shards": str(shard_list(folder, name)), "samples": kept[name]} for name in given}
        after["sources"] = {name: {**source, **found[name]} for name, source in given.items()}
    for name in ("pairs", "chats"):
        if _given(data.get(name)) == before:
            data[name] = {**data[name], **after}
    if _given(data) == before:
        data |= after
    return {**config, "data": data}


def _given(node: Any) -> Config | None:
    """What a node says of the shards to read; None where it is none that could."""
    return {one: node.get(one) for one in GIVEN} if isinstance(node, Mapping) else None
