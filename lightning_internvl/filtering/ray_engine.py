"""The same work spread over a cluster by Ray Data: a shard at a time, by as many actors as the
cluster has room for.

All machines must see the folder of the run, the shards and this package; what a machine has done is
in the folder alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_internvl.distributed.placement import place_of
from lightning_internvl.filtering.decide import Columns
from lightning_internvl.filtering.job import FilterJob
from lightning_internvl.filtering.scores import Scorer
from lightning_internvl.filtering.write import write_shard
from lightning_internvl.layers.attention import choose_backend


def score_all(job: FilterJob, shards: Sequence[int]) -> int:
    """Score shards; returns the number of pairs."""
    return _run_over_shards(_ScoreActor, job, shards)


def write_all(job: FilterJob, shards: Sequence[int]) -> None:
    """Write what is kept of shards."""
    _run_over_shards(_WriteActor, job, shards)


def _run_over_shards(worker: type, job: FilterJob, shards: Sequence[int]) -> int:
    if not shards:
        return 0
    import ray
    import ray.data

    if not ray.is_initialized():
        # RAY_ADDRESS names a cluster; else this machine is one
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    source = Path(job.source).resolve() if job.source and Path(job.source).exists() else job.source
    # Actors may work in other folders
    job = job._replace(folder=job.folder.resolve(), source=source)
    on_gpu = worker is _ScoreActor and torch.cuda.is_available()
    devices: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    units = ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(int(units), len(shards))))
    numbers = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    done = numbers.map_batches(worker, fn_constructor_args=(job,), batch_size=1, compute=actors, **devices)
    return int(sum(row["pairs"] for row in done.iter_rows()))


class _ScoreActor:
    """An actor with the model."""

    def __init__(self, job: FilterJob) -> None:
        choose_backend(job.settings.attention, *place_of(job.settings.trainer))
        self.job, self.scorer = job, job.scorer()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Score some shards, by their numbers."""
        found = [_score_shard(self.job, self.scorer, int(shard)) for shard in batch["shard"]]
        return {"pairs": np.array(found)}


class _WriteActor:
    """An actor without a model."""

    def __init__(self, job: FilterJob) -> None:
        self.folder, self.shards, self.columns = job.folder, job.shards(), Columns(job.columns)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Write some shards, by their numbers."""
        for shard in map(int, batch["shard"]):
            write_shard(self.shards, shard, self.folder, self.columns.reasons(shard))
        return {"pairs": np.zeros(len(batch["shard"]), dtype=np.int64)}


def _score_shard(job: FilterJob, scorer: Scorer, shard: int) -> int:
    _, rows = next(scorer.score([shard]))
    job.keep(shard, rows)
    return len(rows)
