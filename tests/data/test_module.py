"""What a stage's batches are made of: the right samples, and chance that depends on the place in the stage alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from lightning_internvl.data.module import StageData
from lightning_internvl.data.processors.basic import RandomCrop


class Pictures(Dataset[dict[str, Any]]):
    """Five random pictures."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, position: int) -> dict[str, Any]:
        image = np.random.default_rng(position).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        return {"image": image, "key": str(position)}


class Crops:
    """A collator: what a random crop makes of each picture."""

    def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {"key": sample["key"], "crop": RandomCrop(8)(sample["image"], sample["draw"]).tobytes()}

    def stack(self, prepared: list[dict[str, Any]]) -> dict[str, Any]:
        return {"keys": [one["key"] for one in prepared], "crops": [one["crop"] for one in prepared]}


def batches(start: int = 0, workers: int = 0, rank: int = 0, world: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    settings = {"batch_size": 2 // world, "batches": 10, "start_batch": start, "seed": seed, "num_workers": workers}
    data = StageData(Pictures(), Crops(), endless=False, **settings)
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank)
    return list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_stage_sees_the_same_crops(workers: int) -> None:
    whole = batches()
    assert batches(start=3, workers=workers) == whole[3:]
    assert batches(seed=1) != whole


def test_a_picture_is_cut_anew_each_time() -> None:
    seen = [crop for batch in batches() for crop in batch["crops"]]
    assert len(seen) == len(set(seen)) == 20


def test_crops_do_not_depend_on_the_number_of_processes() -> None:
    ranks = [batches(rank=rank, world=2) for rank in (0, 1)]
    assert [a["crops"] + b["crops"] for a, b in zip(*ranks, strict=True)] == [batch["crops"] for batch in batches()]
