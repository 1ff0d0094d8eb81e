"""Loggers: a run of the tracker for each stage, a resumed one goes on with its own, pictures are there."""

from __future__ import annotations

import csv
import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from runs import TINY, train

from callbacks import CsvLogger, MlflowRun
from callbacks.loggers import known_id, wandb_mode
from callbacks.pictures import case_pictures, sample_pictures
from lightning_internvl.config import logger_checks
from lightning_internvl.inference.journal import thumbnail
from lightning_internvl.training.assembly import logger_nodes

PICTURE = np.full((4, 4, 3), 7, np.uint8)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_resumed_csv_file_keeps_what_came_before(tmp_path: Path) -> None:
    for start, steps in ((0, (0, 1, 2)), (2, (2, 3))):
        logger = CsvLogger(save_dir=str(tmp_path), name="first", version="", start_step=start)
        for step in steps:
            logger.log_metrics({"loss": start + step / 10}, step=step)
        logger.finalize("success")
    assert [row["loss"] for row in table(tmp_path / "first")] == ["0.0", "0.1", "2.2", "2.3"]


def test_places_are_filled_in_at_any_depth(tmp_path: Path) -> None:
    node = {"_target_": "x", "group": "{run}", "more": {"tags": ["{stage}", 1]}, "start_step": 0}
    settings: Any = SimpleNamespace(name="first", loggers={"one": node, "none": None})
    (found,) = logger_nodes(settings, tmp_path / "toy" / "12-00", 7)
    assert found == {"_target_": "x", "group": "toy/12-00", "more": {"tags": ["first", 1]}, "start_step": 7}


def test_an_id_is_made_once(tmp_path: Path) -> None:
    ids = iter("abc")
    made = [known_id(tmp_path, "wandb", stage, lambda: next(ids)) for stage in ("one", "two", "one")]
    assert made == ["a", "b", "a"]


def test_without_a_key_wandb_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_pictures_come_with_what_was_said() -> None:
    case = {"question": "what?", "answer": "pig", "truth": "cow", "png": thumbnail(PICTURE)}
    found = case_pictures([case])
    assert found["caption"] == ["what? pig (true: cow)"]
    assert np.array_equal(found["images"][0], PICTURE)
    seen = {"images": [thumbnail(PICTURE)] * 2, "captions_true": ["a cow", "a pig"]}
    nearest = sample_pictures(seen | {"similarity": [[0.1, 0.2], [0.1, 0.3]]})["caption"]
    assert nearest == ["nearest: a pig (true: a cow)", "nearest: a pig (true: a pig)"]
    assert sample_pictures(seen | {"captions": ["x", "y"]})["caption"][1] == "y (true: a pig)"
    own = sample_pictures({"images": ["", thumbnail(PICTURE)], "answers": [[case], [case]]})
    assert (len(own["images"]), own["caption"]) == (1, ["what? pig (true: cow)"])


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger_checks, "find_spec", lambda name: None)
    done = train(*TINY, "logger=[history,wandb,mlflow]")
    assert done.code == 2
    for package in ("wandb", "mlflow", "sqlalchemy"):
        assert f"needs the package {package}, which is not here: pip install -r requirements-loggers.txt" in done.err


def test_bad_words_are_answered_with_the_choices() -> None:
    done = train("logger=[tensorboard,wandbb]")
    assert "'wandbb' in the group logger; did you mean 'wandb'? valid choices: csv, history, mlflow" in done.err
    found = list(logger_checks.logger_faults({"wandb": {"_target_": "callbacks.WandbRun", "offline": "maybe"}}))
    assert any("offline='maybe' must be true" in fault for fault in found)


def test_each_stage_is_a_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs W&B: pip install -r requirements-loggers.txt")
    monkeypatch.setenv("WANDB_MODE", "offline")
    begun, ended = [], []
    init, finish = wandb.init, wandb.Run.finish
    monkeypatch.setattr(wandb, "init", lambda **known: begun.append(known) or init(**known))
    monkeypatch.setattr(wandb.Run, "finish", lambda run, **k: ended.append(run.id) or finish(run, **k))
    run = tmp_path / "toy" / "now"
    done = train(*TINY, f"paths.run={run}", "logger=[csv,wandb]", "pipeline=[contrastive,supervised]", "~callbacks.report")
    assert done.code == 0, done.err
    assert [(one["group"], one["name"]) for one in begun] == [("toy/now", "contrastive"), ("toy/now", "supervised")]
    ids = json.loads((run / "trackers.json").read_text())["wandb"]
    assert [one["id"] for one in begun] == [*ids.values()]
    assert [*dict.fromkeys(ended)] == [*ids.values()]
    folders = sorted(run.glob("wandb/offline-run-*"))
    assert sorted(folder.name.rpartition("-")[2] for folder in folders) == sorted(ids.values())
    for folder in folders:
        assert list(folder.glob("files/media/images/samples_*.png"))
    assert list(run.glob("wandb/*/files/media/images/final/*.png"))  # right and wrong cases of the last stage
    assert {row["step"] for row in table(run / "csv" / "supervised")} > {"0"}
    assert "wandb sync" in done.out


def test_each_stage_is_a_run_of_mlflow_below_that_of_the_pipeline(tmp_path: Path) -> None:
    for package in ("mlflow", "sqlalchemy"):
        pytest.importorskip(package, reason="needs MLflow: pip install -r requirements-loggers.txt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "part_lr": {"encoder.*": 0.5}}))
    (tmp_path / "metrics.json").write_text(json.dumps({"one": {"accuracy": 0.25}}))
    case = {"question": "what?", "answer": "pig", "truth": "cow", "png": thumbnail(PICTURE), "right": False}
    (tmp_path / "stages" / "one").mkdir(parents=True)
    (tmp_path / "stages" / "one" / "cases.json").write_text(json.dumps([case]))
    for step, stage in enumerate(("one", "two", "one")):
        logger = MlflowRun(run_dir=str(tmp_path), stage=stage, group="toy/now")
        logger.log_metrics({"train/loss": 0.5, "a[0]": 1.0}, step=step)
        logger.log_image("samples", [PICTURE], caption=["a cow"], step=step)
        logger.finalize("success")
    ids = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        runs = dict(base.execute("select name, status from runs").fetchall())
        parents = dict(base.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall())
        points = base.execute("select key, step from metrics where run_uuid = ?", (ids["one"],)).fetchall()
        settings = dict(base.execute("select key, value from params where run_uuid = ?", (ids["one"],)).fetchall())
    assert runs == dict.fromkeys(("toy/now", "one", "two"), "FINISHED")
    assert parents == {ids["one"]: ids[""], ids["two"]: ids[""]}
    assert {("train/loss", 0), ("train/loss", 2), ("a_0_", 2), ("final/accuracy", 0)} <= set(points)
    assert settings == {"seed": "3", "part_lr.encoder._": "0.5"}
    files = {file.name for file in (tmp_path / "mlflow" / ids["one"]).rglob("*.png")}
    assert {"step-000000.png", "step-000002.png"} <= files
    assert list((tmp_path / "mlflow").rglob("final/wrong/0/*.txt"))
