"""Sweeps: the table at their end, searches, and jobs that are started elsewhere."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import MissingConfigException
from runs import TINY, once, read_json, train, train_apart

from lightning_internvl.cli import explain
from lightning_internvl.config.sweep import metrics_of, objective_of, rows_of, sweep_table
from lightning_internvl.files import write_json

SHORT = (*TINY, "pipeline=[contrastive]", "logger=[history]", "~callbacks.report", "~callbacks.samples")
METRIC = "contrastive/c_image_to_text_r5"


def job(folder: Path, number: int, words: list[str], state: str = "finished", **metrics: Any) -> None:
    run = folder / str(number)
    about = {"settings": words, "state": state, "run": str(run), "objective": "two/score"}
    write_json(folder / ".jobs" / f"{number}.json", about)
    if metrics:
        write_json(run / "metrics.json", metrics)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_holds_what_differs_and_the_last_metrics(tmp_path: Path) -> None:
    job(tmp_path, 10, ["seed=1", "+x=[a,b]", "same=1"], one={"loss": 1.0}, two={"other": 0.5, "score": 0.25, "score_chance": 0.1})
    write_json(tmp_path / "10" / "stages" / "two" / "best.json", {"metric": "score", "value": 0.75})
    job(tmp_path, 9, ["seed=2", "same=1"], "failed: no")
    failed, finished = rows_of(tmp_path)
    assert failed == {"job": 9, "seed": "2", "x": "", "state": "failed: no"}
    assert [*finished] == ["job", "seed", "x", "state", "two/score", "two/other", "two/best"]
    assert (finished["x"], finished["two/score"], finished["two/best"]) == ("[a,b]", 0.25, 0.75)


def test_of_one_job_all_settings_are_shown(tmp_path: Path) -> None:
    job(tmp_path, 0, ["seed=1", "~callbacks.report"])
    assert rows_of(tmp_path) == [{"job": 0, "seed": "1", "~callbacks.report": "", "state": "finished"}]


def test_the_objective_is_one_metric_or_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "metrics.json", {"one": {"loss": 1}, "two": {"score": 0.5, "score_chance": 0.1}})
    assert metrics_of(tmp_path) == {"one/loss": 1, "two/score": 0.5}
    assert objective_of(tmp_path, None) is None
    assert objective_of(tmp_path, "two/score") == 0.5
    assert objective_of(tmp_path, ["one/loss", "two/score"]) == (1.0, 0.5)
    with pytest.raises(ValueError, match=r"two/scor: .* has no such metric; did you mean 'two/score'\?"):
        objective_of(tmp_path, "two/scor")


def test_without_a_sweep_there_is_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    with sweep_table():
        pass
    assert capsys.readouterr().out == ""


def test_jobs_that_fail_have_their_rows(tmp_path: Path) -> None:
    done = train("--multirun", *SHORT, "seed=-1,-2", f"paths.sweep={tmp_path}")
    assert done.code == 2
    assert [(row["seed"], row["state"].partition(":")[0]) for row in table(tmp_path)] == [("-1", "failed"), ("-2", "failed")]
    assert "job 1 failed: seed=-2 must be a whole number" in done.out
    assert (tmp_path / "sweep.md").read_text().splitlines()[0] == "| job | seed | state |"


def test_a_metric_of_no_stage_is_refused() -> None:
    done = train(*SHORT, "objective_metric=contrastiv/loss")
    assert "objective_metric='contrastiv/loss' must be STAGE/METRIC" in done.err
    assert "did you mean 'contrastive'?" in done.err


def test_optuna_searches(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs Optuna: pip install -r requirements-sweeps.txt")
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize")
    words = ("--multirun", *SHORT, *search, "optimizer.lr=tag(log,interval(1e-5,1e-2))", f"paths.sweep={tmp_path}")
    refused = train(*words)
    assert "hydra/sweeper=optuna needs a metric; objective_metric=STAGE/METRIC" in refused.err
    done = train(*words, f"objective_metric={METRIC}")
    assert done.code == 0, done.err
    rows = table(tmp_path)
    assert len({row["optimizer.lr"] for row in rows}) == 2
    values = [read_json(tmp_path / row["job"] / "metrics.json")["contrastive"]["c_image_to_text_r5"] for row in rows]
    assert [float(row[METRIC]) for row in rows] == values
    assert f"best_value: {max(values)}" in (tmp_path / "optimization_results.yaml").read_text()


def test_submitit_starts_jobs_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs submitit: pip install -r requirements-sweeps.txt")
    done = train_apart("--multirun", *once(*SHORT), "hydra/launcher=submitit_local", "seed=3", f"paths.sweep={tmp_path}")
    assert done.code == 0, done.err
    (row,) = table(tmp_path)
    assert row["state"] == "finished"
    assert row[METRIC]
    assert list((tmp_path / ".submitit").glob("*/*_result.pkl"))


def test_a_job_that_slurm_starts_again_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--multirun", *SHORT, "~callbacks.evaluation", "seed=3", f"paths.sweep={tmp_path}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert train(*words).code == 0
    again = train(*words)
    assert "already holds a run" in again.err  # the same command a second time in the same job
    assert table(tmp_path)[0]["state"].startswith("failed")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = train(*words)
    assert again.code == 0, again.err
    assert f"SLURM job 77 was started again: goes on with {tmp_path / '0'}" in again.out
    assert "contrastive: finished earlier" in again.out


def test_jobs_of_slurm_need_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    done = train("--multirun", "hydra/launcher=submitit_slurm", "seed=0,1")
    assert done.code == 2
    assert "there is no srun on this machine" in done.err


def test_a_study_in_a_database_is_refused() -> None:
    done = train("--multirun", "hydra/sweeper=optuna", "hydra.sweeper.storage=sqlite:///study.db")
    assert "hydra.sweeper.storage=sqlite:///study.db: the plugin's Optuna (2.10) keeps no study in a database" in done.err


def test_a_plugin_that_is_missing_is_named() -> None:
    said = explain(MissingConfigException("x", missing_cfg_file="hydra/sweeper/optuna", options=["basic"]))
    assert said == "hydra/sweeper=optuna is not here; it comes with pip install -r requirements-sweeps.txt"
