"""The time that is left in a run: what is measured, what follows from FLOPs, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.cli import CONF
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.config.targets import build
from lightning_internvl.files import write_json
from lightning_internvl.plan.cost import counted_flops
from lightning_internvl.training import time_left
from lightning_internvl.training.time_left import Pace, TimeLeft, about

FLOPS = {"contrastive": 2.0, "generative": 4.0, "supervised": 1.0}


def stages(*words: str) -> dict[str, Any]:
    """Three stages by name, with other settings."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides=["~experiment", "max_steps=100", *words]), resolve=True)
    return RunSettings.of(config).stages


def left(run_dir: Path, *words: str, without: str = "", **flops: float | None) -> TimeLeft:
    found = stages(*words)
    ahead = [one for name, one in found.items() if name != without]
    return TimeLeft([*found], ahead, run_dir, lambda one: (FLOPS | flops)[one.name])


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time_left, "time", found)
    return found


def test_the_pace_is_that_of_the_last_minute(clock: Clock) -> None:
    pace = Pace(50)  # of a stage that was resumed
    assert pace.at(50) == 0
    clock.now = 10
    assert pace.at(60) == 1
    for clock.now in range(20, 200, 10):
        found = pace.at(60 + 10 * (int(clock.now) - 10))
    assert found == pytest.approx(10)


def test_later_stages_count_by_their_flops(tmp_path: Path) -> None:
    run = left(tmp_path)
    # 50 steps here, 100 of twice and 100 of half the FLOPs
    assert run.told("contrastive", 50, 2.0) == f"{about((50 + 200 + 50) / 2)} of training left in the run"
    assert run.told("generative", 50, 2.0) == f"{about((50 + 25) / 2)} of training left in the run"
    assert run.told("supervised", 50, 2.0) == "about 25 s of training left in the run"
    assert run.told("contrastive", 50, 0.0) == ""  # nothing is measured yet
    assert [run.place(name) for name in FLOPS] == ["1/3", "2/3", "3/3"]


def test_evaluations_count_once_one_is_measured(tmp_path: Path) -> None:
    write_json(tmp_path / "timing.json", {"contrastive": {"eval_seconds": 10.0}, "filter": {"pairs_per_second": 3}})
    assert left(tmp_path).told("generative", 50, 2.0) == f"{about((50 + 25) / 2 + 2 * 10)} left in the run"
    nothing_held_out = left(tmp_path, "~data.held_out._target_")
    assert nothing_held_out.told("generative", 50, 2.0) == "about 38 s left in the run"


def test_a_stage_that_is_taken_from_another_run_takes_no_time(tmp_path: Path) -> None:
    run = left(tmp_path, without="generative")
    assert run.told("contrastive", 50, 2.0) == "about 50 s of training left in the run"
    assert run.place("supervised") == "3/3"


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    run = left(tmp_path, generative=None)
    assert run.told("contrastive", 50, 2.0) == "about 50 s of training left in the run, generative not counted"
    words = ("pipeline=[contrastive,filter,generative]", "data=webdataset", f"data.shards={tmp_path}")
    with_filter = left(tmp_path, *words)
    assert with_filter.place("generative") == "3/3"
    assert with_filter.told("contrastive", 50, 2.0) == "about 2 min of training left in the run, filter not counted"


def test_flops_are_counted_once_for_each_stage(tmp_path: Path) -> None:
    counted: list[str] = []
    found = stages()
    run = TimeLeft([*found], [*found.values()], tmp_path, lambda one: counted.append(one.name) or 1.0)
    for name in FLOPS:
        run.told(name, 5, 1.0)
        run.told(name, 4, 1.0)
    assert counted == [*FLOPS]


def test_flops_are_those_of_the_plan_with_accumulation() -> None:
    one = stages()["contrastive"]
    assert isinstance(one, StageSettings)
    flops = counted_flops(one, build)
    assert flops == pytest.approx(64 * 0.000215e12, rel=0.01)  # as plan=true prints them
    twice = replace(one, trainer=replace(one.trainer, accumulate_grad_batches=2))
    assert counted_flops(twice, build) == pytest.approx(2 * flops)
    unknown = replace(one, trainer=replace(one.trainer, precision="transformer-engine"))
    assert counted_flops(unknown, build) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "about 1 s"), (89.0, "about 89 s"), (91.0, "about 2 min"), (3600.0, "about 60 min"), (9000.0, "about 2.5 h")],
)
def test_the_unit_fits(seconds: float, words: str) -> None:
    assert about(seconds) == words
