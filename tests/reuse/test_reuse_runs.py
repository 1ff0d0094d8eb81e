"""Runs that take finished stages from others: which, from where, and that nothing tells the difference."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import STAGES, TINY, call, losses, read_json, same_weights, tiny_run, train, weights

from lightning_internvl.checkpoints.weight_source import check_whole
from lightning_internvl.config.effects import NOT_TAKEN
from lightning_internvl.config.filter_settings import FilterSettings
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.targets import build
from lightning_internvl.files import RUN_CONFIG, write_json
from lightning_internvl.reuse.take import NOTE, take_finished
from lightning_internvl.stages import GenerativeStage

OTHER = "stages.supervised.optimizer.lr=3.0e-3"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, `one`."""
    folder = tmp_path_factory.mktemp("root")
    tiny_run(folder / "one")
    return folder


@pytest.fixture
def config(root: Path) -> dict[str, Any]:
    """The configuration of that run, which takes what it can from where it lies."""
    return yaml.safe_load((root / "one" / RUN_CONFIG).read_text()) | {"reuse": str(root)}


def take(config: dict[str, Any], run: Path) -> list[str]:
    """The stages that a run with this configuration takes."""
    take_finished(RunSettings.of(config), run, build)
    return list(read_json(run / NOTE))


def trained(run: Path) -> list[str]:
    """The stages that a run has trained itself, in their order."""
    return sorted((path.parent.name for path in run.glob("checkpoints/*/last.ckpt")), key=STAGES.index)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_that_differs_in_its_last_stage_trains_that_alone(root: Path, tmp_path: Path) -> None:
    bare = tiny_run(tmp_path / "bare", OTHER)
    shutil.copytree(root / "one", tmp_path / "root" / "deep" / "one")
    done = train(*TINY, OTHER, f"paths.run={tmp_path}/run", f"paths.root={tmp_path}/root", "reuse=true")
    assert done.code == 0, done.err
    run, one = tmp_path / "run", tmp_path / "root" / "deep" / "one"
    assert trained(run) == ["supervised"]
    assert f"contrastive: taken from {one}, which has trained it from the same start" in done.out
    assert f"generative: taken from {one}" in done.out
    differs = f"supervised: trains, for the nearest finished one, in {one}, differs: optimizer.lr is 0.0015 there, 0.003 here"
    assert f"{differs}\n" in done.out
    shutil.rmtree(tmp_path / "root")
    for stage in STAGES:
        check_whole(run / "handoff" / stage)
        assert same_weights(run, bare, stage)
        assert losses(run, stage) == losses(bare, stage)
        assert files(run / "stages" / stage) == files(bare / "stages" / stage)
    assert (run / "metrics.json").read_bytes() == (bare / "metrics.json").read_bytes()
    assert list(read_json(run / "timing.json")) == list(STAGES)
    assert read_json(run / NOTE) == {stage: str(one) for stage in STAGES[:3]}
    assert (run / "report.html").read_text().count("not trained here: taken from") == 3
    assert (run / "tensorboard" / "contrastive").is_dir()


def test_a_run_of_which_all_is_finished_trains_nothing_and_is_itself_taken(
    root: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    assert take(config, tmp_path / "all" / "first") == list(STAGES)
    shutil.copy(root / "one" / RUN_CONFIG, tmp_path / "all" / "first")
    assert take(config | {"reuse": str(tmp_path / "all")}, tmp_path / "second") == list(STAGES)
    run = tmp_path / "second"
    assert (run / "metrics.json").read_bytes() == (root / "one" / "metrics.json").read_bytes()
    assert (run / "report.html").read_text().count("not trained here") == 4
    shutil.copy(root / "one" / RUN_CONFIG, run)
    done = train(f"resume={run}")
    assert done.code == 0, done.err
    assert done.out.count("finished earlier") == 4


def seed(config: dict[str, Any]) -> None:
    config["seed"] = 1


def precision(config: dict[str, Any]) -> None:
    config["trainer"]["precision"] = "bf16-mixed"


def start(config: dict[str, Any]) -> None:
    config["init_from"] = f"{config['reuse']}/one/handoff/contrastive"


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (seed, "seed is 0 there, 1 here"),
        (precision, 'trainer.precision is "32-true" there, "bf16-mixed" here'),
        (start, "the weights it starts from are another"),
    ],
)
def test_another_input_is_told(
    change: Callable[[dict[str, Any]], None],
    differs: str,
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(config)
    assert take(config, tmp_path) == []
    place = f"{config['reuse']}/one"
    assert capsys.readouterr().out == f"contrastive: trains, for the nearest finished one, in {place}, differs: {differs}\n"


@pytest.mark.parametrize("what", ["encoder.safetensors", "manifest.json", "stage_key.json"])
def test_a_damaged_hand_off_is_not_taken(
    what: str, root: Path, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "one", tmp_path / "all" / "one")
    file = tmp_path / "all" / "one" / "handoff" / "generative" / what
    file.write_bytes(file.read_bytes()[:-2] + b"  ")
    assert take(config | {"reuse": str(tmp_path / "all")}, tmp_path / "run") == ["contrastive"]
    *_, last = capsys.readouterr().out.splitlines()
    assert "damaged" in last or what == "stage_key.json"
    assert not (tmp_path / "run" / "handoff" / "generative").exists()
    assert "generative" not in read_json(tmp_path / "run" / "metrics.json")
    assert not list((tmp_path / "run").rglob("*.draft"))


def test_neither_a_filter_is_taken_nor_what_follows_it(config: dict[str, Any], tmp_path: Path) -> None:
    run = RunSettings.of(config)
    step = FilterSettings("filter", {}, None, "c", "local", 1, 0, {}, 0.0, run.trained[0], False)
    stages = {"contrastive": run.stages["contrastive"], "filter": step, "generative": run.stages["generative"]}
    take_finished(RunSettings(None, "auto", "high", stages, config), tmp_path, build)
    assert list(read_json(tmp_path / NOTE)) == ["contrastive"]


def test_a_run_that_has_taken_a_stage_is_stopped_and_resumed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("crash")

    run, words = tmp_path / "run", ("stages.generative.optimizer.lr=3.0e-3", "pipeline=[contrastive,generative]")
    with monkeypatch.context() as patch:
        patch.setattr(GenerativeStage, "losses", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(*TINY, *words, f"paths.run={run}", f"reuse={root}")
    done = train(f"resume={run}")
    assert done.code == 0, done.err
    assert "contrastive: finished earlier" in done.out
    assert "differs" not in done.out
    assert trained(run) == ["generative"]
    assert "not trained here" in (run / "report.html").read_text()


def test_a_stage_that_a_limit_of_time_has_stopped_is_not_taken(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = train(*TINY, "pipeline=[contrastive]", f"paths.run={tmp_path}/all/run", "trainer.max_time=00:00:00:00")
    assert "trainer.max_time is over" in done.err, done.err
    assert take(config | {"reuse": str(tmp_path / "all")}, tmp_path / "again") == []
    assert capsys.readouterr().out.startswith("contrastive: trains, for no run in ")


def test_further_processes_wait_for_the_first(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        write_json(tmp_path / NOTE, {})

    monkeypatch.setattr("time.sleep", sleep)
    assert take(config, tmp_path) == []
    assert len(waits) == 1


def test_a_sweep_over_decoders_trains_the_stages_before_once(tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith("decoder.")]
    words += ["decoder=llama_toy,qwen_toy", "callbacks.samples=null", f"paths.sweep={tmp_path}"]
    done = call("train.py", "--multirun", *words)
    assert done.code == 0, done.err
    assert [trained(tmp_path / job) for job in "01"] == [[*STAGES], ["words", "supervised"]]
    assert re.findall(r"(\w+): taken from (\S+),", done.out) == [(stage, f"{tmp_path}/0") for stage in STAGES[:2]]
    assert weights(tmp_path / "0", "supervised").keys() != weights(tmp_path / "1", "supervised").keys()
    assert len((tmp_path / "sweep.md").read_text().splitlines()) == 4
    metrics = [read_json(tmp_path / job / "metrics.json") for job in "01"]
    assert metrics[0]["generative"] == metrics[1]["generative"]
    assert list(metrics[1]) == list(STAGES)


def test_a_place_that_is_not_there_and_a_reuse_in_vain_are_refused(tmp_path: Path) -> None:
    for word, says in {
        "reuse=nowhere": "reuse=nowhere: there is no such folder",
        "reuse=3": "reuse=3 must be sweep (from",
    }.items():
        assert says in train(*TINY, f"paths.run={tmp_path}/run", word).err
    words = ("pipeline=[filter,contrastive]", "data=webdataset", f"data.shards={tmp_path}", "init_from=x", "reuse=true")
    assert f"reuse=true has no effect: {NOT_TAKEN}" in train(*TINY, *words, f"paths.run={tmp_path}/run").err
