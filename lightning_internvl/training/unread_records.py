"""What of a stage's records is not read: told, and refused above a share, before weights are
loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_internvl.choices import trained_stages
from lightning_internvl.config.stage_settings import settings_of_stage
from lightning_internvl.console import console
from lightning_internvl.data.files.datasets import FileDataset
from lightning_internvl.messages import ConfigError
from lightning_internvl.model.compose import Build


def check_records(config: Mapping[str, Any], build: Build) -> None:
    """Look at some records of every stage that reads files (`FileDataset.unread`).

    Raises:
        ConfigError: if more of them than `data.max_unread_fraction` hold something that is not
            read.
        ValueError: for data that cannot be read.
    """
    told: set[str] = set()
    for name in trained_stages(config):
        settings = settings_of_stage(config, name, config["stages"][name])
        node = settings.data.dataset(settings.reads)
        streamed = "shards" in node  # which tells while it trains (`StreamedAccount`)
        if streamed or node.get("path", 0) is None or str(node) in told:
            continue
        told.add(str(node))
        dataset = build(node)
        if not isinstance(dataset, FileDataset):
            continue
        account = dataset.unread()
        if fault := account.fault(settings.data.max_unread_fraction):
            raise ConfigError([f"{name}: {fault}"])
        if account.line:
            console.print(f"{name}: {account.line}", soft_wrap=True, markup=False, highlight=False)
