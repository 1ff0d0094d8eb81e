"""The settings of a run: those of its stages and filters, each made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_internvl.choices import PRODUCTS, Config, is_step
from lightning_internvl.config.filter_settings import FilterSettings, filter_settings, with_kept_shards
from lightning_internvl.config.stage_settings import StageSettings, stage_settings


@dataclass(frozen=True)
class RunSettings:
    """A run as its resolved configuration describes it.

    Attributes:
        init_from: where its first weights come from.
        matmul_precision: how exactly a GPU multiplies matrices of float32.
        stages: and filters, in the order of the pipeline.
        config: the configuration itself.
    """

    init_from: str | None
    attention: str
    matmul_precision: str
    stages: dict[str, StageSettings | FilterSettings]
    config: Config

    @classmethod
    def of(cls, config: Config) -> RunSettings:
        """From a configuration, resolved and checked, as plain containers."""
        nodes, names = config["stages"], config["pipeline"]
        makers = {name: filter_settings if is_step(nodes[name]) else stage_settings for name in names}
        stages = {name: make(config, name) for name, make in makers.items()}
        products = config.get("matmul_precision", PRODUCTS[0])  # runs from before it have none
        return cls(config["init_from"], config["attention"], products, stages, config)

    @property
    def trained(self) -> list[StageSettings]:
        """The stages that train."""
        return [one for one in self.stages.values() if isinstance(one, StageSettings)]

    def after_filter(self, folder: Path, kept: Mapping[str, int]) -> RunSettings:
        """The same run where it reads what a filter has kept.

        Args:
            folder: of the filter.
            kept: pairs by source.
        """
        return RunSettings.of(with_kept_shards(self.config, folder, kept))
