"""Training from shards: stopped and resumed with other data processes it ends with the same bits; faults are told first."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from runs import losses, same_weights, stopped_before, tiny_run, train

from lightning_internvl.cli import CONF
from lightning_internvl.config.checks import check_config
from lightning_internvl.data.shards.tar import TarWriter
from lightning_internvl.messages import ConfigError
from lightning_internvl.stages import ContrastiveStage, SupervisedStage

STAGES = {"contrastive": ContrastiveStage, "supervised": SupervisedStage}
SHORT = (
    "data=webdataset", "logger=[history]", "callbacks.report=null", "callbacks.progress=null",
    "pipeline=[contrastive,supervised]", "callbacks.checkpoint.every_n_steps=1",
    "data.lanes=2", "data.turns=2", "data.shuffle=3", "data.max_bad_fraction=0.2",
    "data.packing=true", "data.packing_window=2", "data.chats_collate.max_text_tokens=64", "stages.supervised.batch_size=2",
    "stages.supervised.new=[encoder,middleware,decoder]", "stages.supervised.dropped=[objectives]",
)  # fmt: skip


def write_shards(folder: Path, shards: int, start: int = 0, torn: int | None = None) -> None:
    """Ten pairs a shard, one of them without a caption; a shard may be cut off."""
    for shard in range(start, start + shards):
        path = folder / f"{shard:05}.tar"
        with TarWriter(path) as tar:
            for number in range(10):
                pixels = np.random.default_rng([shard, number]).integers(0, 256, (40, 52, 3), dtype=np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG")
                caption = "" if number == 4 else f"picture {number} of {shard}"
                tar.write({"key": f"{shard:05}{number:04}", "jpg": stream.getvalue(), "txt": caption})
        if shard == torn:
            path.write_bytes(path.read_bytes()[:15000])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "a", 5, torn=3)
    write_shards(folder / "b", 3, start=5)
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_stopped_and_resumed_equals_never_stopped(shards: Path, tmp_path: Path) -> None:
    sources = f"data.sources={{a: {{shards: '{shards}/a/{{00000..00004}}.tar', weight: 2}}, b: {{shards: '{shards}/b'}}}}"
    whole, run = tiny_run(tmp_path / "whole", *SHORT, sources, "data.num_workers=0"), tmp_path / "run"
    with stopped_before(3, ContrastiveStage):
        tiny_run(run, *SHORT, sources, "data.num_workers=0")
    with stopped_before(3, SupervisedStage):
        train(f"resume={run}", "data.num_workers=2")
    outcome = train(f"resume={run}", "data.num_workers=0")
    assert outcome.code == 0, outcome.err
    assert "supervised: goes on from step 3" in outcome.out
    for stage in STAGES:
        assert same_weights(whole, run, stage)
        assert losses(run, stage) == losses(whole, stage)
        texts = [(folder / "stages" / stage / "skipped.jsonl").read_text() for folder in (whole, run)]
        assert texts[0] == texts[1]
        rows = [json.loads(line) for line in texts[0].splitlines()]
        assert {row["source"] for row in rows} <= {"a", "b"}
        assert all(row["key"].startswith(str(shards)) for row in rows)
    assert "samples were skipped (empty caption: " in outcome.out


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", ["data=webdataset", "paths.run=run"]), resolve=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": "HERE/a/{00003..00006}.tar"}, "data.shards: 2 of 4 shards do not exist: HERE/a/00005.tar, "),
        ({"shards": "HERE/*.tgz"}, "data.shards: HERE/*.tgz matches no file"),
        ({"shards": "HERE/empty"}, "data.shards: there is no sample in 1 of 1 shards: shard HERE/empty/0.tar: empty"),
        ({}, "no shards are given; give 'data.shards=\"DIR/{00000..00099}.tar\"'"),
        ({"shards": "HERE/a", "sources": {"a": "HERE/a"}}, "both data.shards and data.sources are given"),
        ({"sources": {"a": {"shards": "HERE/a", "weight": 0}}}, "all sources have weight 0 (a)"),
        ({"sources": {"a": {"shards": "HERE/a", "wieght": 2}}}, "there is no setting 'wieght'; did you mean 'weight'?"),
        (
            {"sources": {"a": "HERE/a", "b": "HERE/c/{0..9}.tar"}},
            "data.sources.b.shards: 10 of 10 shards do not exist: HERE/c/0.tar",
        ),
        ({"sources": {"a": "HERE/a"}, "weights": {"b": 1}}, "data.weights: there is no source 'b'; valid choices: a"),
        ({"shards": "HERE/a", "weights": "many"}, "data.weights='many' is not known; valid choices: null, size, sqrt"),
        (
            {"shards": "HERE/a", "schedule": [{"step": 5, "weights": {}}]},
            "steps of data.schedule start at 0 and rise, but they are [5]",
        ),
        ({"shards": "HERE/a", "schedule": [{"step": 0, "weights": {"a": 1}}]}, "data.weights: there is no source 'a'"),
        ({"shards": "HERE/a", "schedule": {"shards": 1}}, "data.schedule={'shards': 1} is no list of steps"),
        ({"shards": "HERE/a", "num_workers": 3}, "data.turns=8 evenly; fitting numbers: 0, 1, 2, 4, 8"),
        ({"shards": "HERE/a", "lanes": 9, "devices": 2}, "data.lanes=9 must be a multiple of the 2 processes"),
        ({"shards": "HERE/a", "shuffle": 0}, "data.shuffle=0 must be a whole number above 0"),
    ],
)
def test_what_cannot_work_is_said_first(settings: dict[str, Any], message: str, shards: Path, config: dict[str, Any]) -> None:
    """Where the faults of any configuration are found, before PyTorch is imported."""
    (shards / "empty").mkdir(exist_ok=True)
    (shards / "empty" / "0.tar").touch()
    here = json.loads(json.dumps(settings).replace("HERE", str(shards)))
    trainer = {**config["trainer"], "devices": here.pop("devices", 1)}
    with pytest.raises(ConfigError, match=re.escape(message.replace("HERE", str(shards)))):
        check_config({**config, "trainer": trainer, "data": {**config["data"], **here}})
