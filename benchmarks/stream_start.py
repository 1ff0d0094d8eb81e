"""How long training from shards takes to its first batch: on a list of 100,000 shards, and 50,000 steps into an epoch.

python benchmarks/stream_start.py                       # writes 0.8 GB of shards to a temporary folder, takes minutes
python benchmarks/stream_start.py steps=1000 workers=4

Every shard is one of ten files by another name: pairs with a JPEG of 640 x 480 px, of which a part is resized to 224 px. "start"
is a new stage on 100,000 shards of 100 pairs: the look for missing files, opening the data, and the first batch. "resume" is the
first batch of a stage that goes on where one stood after so many steps on 400 shards of 10,000 pairs; where it stood is found by
walking the same lanes through shards without content. Prints one JSON line, times in seconds.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from lightning_internvl.config.stream_checks import stream_faults
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.module import StageData
from lightning_internvl.data.processors.basic import RandomCrop
from lightning_internvl.data.shards.datasets import ShardDataset, ShardPairs
from lightning_internvl.data.shards.tar import MarkedRecord, Record, Shards, TarShards, TarWriter
from lightning_internvl.data.tokenizer import toy_tokenizer

BATCH, FILES = 64, 10


class Empty(Shards):
    """Shards with so many records of so many bytes, and nothing in them."""

    def __init__(self, shards: int, records: int, size: int) -> None:
        self.shards, self.records, self.size = shards, records, size

    def __len__(self) -> int:
        return self.shards

    def name(self, shard: int) -> str:
        return str(shard)

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        for number in range(start, self.records):
            record = MarkedRecord(key=str(number))
            record.mark = number, number * self.size
            yield record


class Walked(ShardDataset):
    """Records that are passed by."""

    def sample(self, record: Record, source: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class Names:
    """A collator of nothing but keys."""

    def prepare(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        return {"key": sample["key"]}

    def stack(self, prepared: list[dict[str, Any]]) -> dict[str, Any]:
        return {"keys": [one["key"] for one in prepared]}


def write_shards(folder: Path, shards: int, records: int) -> str:
    """The pattern of so many names for `FILES` files."""
    folder.mkdir()
    blurred = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    picture, stream = Image.fromarray(blurred).resize((640, 480), Image.Resampling.BICUBIC), io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    for shard in range(min(shards, FILES)):
        with TarWriter(folder / f"{shard:06}.tar") as tar:
            for record in range(records):
                tar.write({"key": f"{record:09}", "jpg": stream.getvalue(), "txt": "a blurred picture", "json": {"width": 640}})
    for shard in range(FILES, shards):
        os.link(folder / f"{shard % FILES:06}.tar", folder / f"{shard:06}.tar")
    return f"{folder}/{{000000..{shards - 1:06}}}.tar"


def staged(data: ShardDataset, collate: Any, steps: int, workers: int = 0, start: int = 0) -> StageData:
    """The data of a stage on one device."""
    found = StageData(data, collate, batch_size=BATCH, batches=steps + 10, start_batch=start, num_workers=workers)
    found.trainer = SimpleNamespace(world_size=1, global_rank=0)
    return found


def first_batch(stage: StageData) -> tuple[list[str], float]:
    """The keys of the first batch, and when it was there; data processes take time to end afterwards."""
    loader = iter(stage.train_dataloader())
    keys = stage.on_before_batch_transfer(next(loader), 0)["keys"]
    return keys, time.perf_counter()


def measure_start(pattern: str, shards: int, collate: PairCollator, workers: int) -> dict[str, float]:
    """Seconds until a new stage has found no fault, has opened its data, and has its first batch."""
    settings = {"shards": pattern, "lanes": 8, "turns": 8, "shuffle": 200, "run": 1, "num_workers": workers}
    begun = time.perf_counter()
    assert not list(stream_faults(settings, 1, look=True))
    checked = time.perf_counter()
    stage = staged(ShardPairs(pattern), collate, 0, workers)
    assert len(stage.dataset.sources["shards"]) == shards
    opened = time.perf_counter()
    _, there = first_batch(stage)
    return {"checked": checked - begun, "opened": opened - checked, "first_batch": there - opened}


def main(steps: int = 50_000, workers: int = 0, shards: int = 400, records: int = 10_000, listed: int = 100_000) -> None:
    """Measure, and print one JSON line."""
    collate = PairCollator(toy_tokenizer(), RandomCrop(224), tasks=("itc",))
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"benchmark": "stream_start", "machine": platform.machine(), "torch": torch.__version__}
        found |= {"batch": BATCH, "steps": steps, "workers": workers}
        found["start"] = measure_start(write_shards(Path(folder, "many"), listed, 100), listed, collate, workers)
        pattern = write_shards(Path(folder, "large"), shards, records)
        size = next(TarShards(pattern).read(0, 1)).mark[1]
        walked = staged(Walked(Empty(shards, records, size)), Names(), steps)
        begun = time.perf_counter()
        loader = iter(walked.train_dataloader())
        for _ in range(steps):
            walked.on_before_batch_transfer(next(loader), 0)
        found["walked"] = time.perf_counter() - begun
        begun = time.perf_counter()
        resumed = staged(ShardPairs(pattern), collate, steps, workers, start=steps)
        resumed.load_state_dict({"positions": [walked.position]})
        keys, there = first_batch(resumed)
        found["resume"] = there - begun
        following = walked.on_before_batch_transfer(next(loader), 0)["keys"]
        assert [int(key.rpartition("/")[2]) for key in keys] == [int(key.rpartition("/")[2]) for key in following]
    print(json.dumps({name: _rounded(value) for name, value in found.items()}))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main(**{name: int(value) for name, _, value in (argument.partition("=") for argument in sys.argv[1:])})
