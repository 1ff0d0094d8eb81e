"""Loggers of Lightning as runs need them: each stage is a run of its own in the tracker, a resumed
stage goes on with its run, and those of one pipeline stand together.

The packages of W&B and MLflow are imported when the first line is logged, and not before.
"""

from __future__ import annotations

import csv
import logging
import netrc
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.pictures import case_pictures
from lightning_internvl.console import console
from lightning_internvl.files import RUN_CONFIG, read_json, write_json
from lightning_internvl.messages import flat

IDS = "trackers.json"  # in a run's folder: the ids that trackers have for its stages
WANDB = "https://api.wandb.ai"
FINAL = "final/"  # begins the names of what was measured at the end of a stage


class CsvLogger(CSVLogger):
    """Lightning's CSV logger, which a resumed stage goes on with instead of deleting its rows.

    Args:
        start_step: rows of this step and later ones are dropped first.
        settings: of `lightning.pytorch.loggers.CSVLogger`.
    """

    def __init__(self, *, start_step: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.start_step = start_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of `metrics.csv`."""
        if self._experiment is None:
            rows = self._earlier_rows()
            writer = super().experiment
            writer.metrics = [row for row in rows if int(row["step"]) < self.start_step]
            writer.save()
        return self._experiment

    def _earlier_rows(self) -> list[dict[str, Any]]:
        """What the file holds. It is taken away, for Lightning warns of a folder with files."""
        file = Path(self.log_dir, "metrics.csv")
        if not file.is_file():
            return []
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        file.unlink()
        return [row for row in rows if str(row.get("step")).isdigit()]


class WandbRun(WandbLogger):
    """A stage as a run of W&B.

    Args:
        run_dir, stage: whose run it is. A resumed stage goes on with its W&B run; what a killed
            one had logged after its last checkpoint then stands there twice.
        offline: whether nothing is sent, but written to `RUN/wandb/` for `wandb sync`. None: as
            WANDB_MODE says, and without that if this machine knows no key.
        settings: of `lightning.pytorch.loggers.WandbLogger`, and those of `wandb.init`.
    """

    def __init__(self, *, run_dir: str, stage: str, offline: bool | None = None, **settings: Any) -> None:
        modes = {True: "offline", False: "online", None: wandb_mode()}
        super().__init__(save_dir=run_dir, mode=modes[offline], **settings)
        self.run_dir, self.stage = Path(run_dir), stage

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, which begins here."""
        if self._experiment is None:
            known = {"silent": True}  # W&B prints twenty lines a stage; ours says the same in one
            self._wandb_init |= {"id": known_id(self.run_dir, "wandb", self.stage, _new_id)}
            self._wandb_init["settings"] = known | (self._wandb_init.get("settings") or {})
            run = super().experiment
            run.config.update(read_config(self.run_dir), allow_val_change=True)
            place = run.url or f"offline, wandb sync {Path(run.dir).parent} sends it"
            console.print(f"W&B run {run.name}: {place}", soft_wrap=True, markup=False)
        return self._experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, which W&B keeps for the whole process; the next stage has its own."""
        if self._experiment is None:
            return
        super().finalize(status)
        if status == "success":
            values, cases = measured(self.run_dir, self.stage)
            self.experiment.summary.update(values)
            for key, shown in cases.items():
                self.log_image(key=key, **case_pictures(shown))
        self.experiment.finish(exit_code=int(status != "success"))


class MlflowRun(Logger):
    """A stage as a run of MLflow, below one of the whole pipeline.

    Args:
        run_dir, stage: whose run it is; a resumed stage goes on with it.
        group: the name of the run of the pipeline, below which it stands.
        experiment: the name under which MLflow collects runs.
        tracking_uri: of a server or a database. None: as MLFLOW_TRACKING_URI says, and without
            that a database in the run's folder, `RUN/mlflow.db`, with its pictures beside it.
        tags: of the run.
    """

    def __init__(
        self,
        *,
        run_dir: str,
        stage: str,
        group: str,
        experiment: str = "lightning_internvl",
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.run_dir, self.stage, self.tags = Path(run_dir).absolute(), stage, dict(tags or {})
        given = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = given or f"sqlite:///{self.run_dir / 'mlflow.db'}"
        self.artifacts = None if given else (self.run_dir / "mlflow").as_uri()
        self.collection, self.group = experiment, group
        self.inner: MLFlowLogger | None = None

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self.collection

    @property
    def version(self) -> str | None:
        """The id of the run, once something is logged."""
        return self.inner.run_id if self.inner else None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The client of MLflow, with the runs begun."""
        if self.inner is None:
            self.inner = self._begin()
            console.print(f"MLflow run {self.stage}: {self.uri}", soft_wrap=True, markup=False)
        return self.inner.experiment

    def _begin(self) -> MLFlowLogger:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for noisy in ("mlflow.store.db.utils", "alembic"):  # of the tables that they make
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(self.collection)
        home = found and found.experiment_id
        home = home or client.create_experiment(self.collection, self.artifacts)

        def new(name: str, tags: Mapping[str, Any]) -> str:
            run = client.create_run(home, tags={**self.tags, **tags}, run_name=name).info.run_id
            client.log_dict(run, read_config(self.run_dir), RUN_CONFIG)
            _log_settings(client, run, read_config(self.run_dir))
            return run

        whole = known_id(self.run_dir, "mlflow", "", lambda: new(self.group, {}))
        below = {"mlflow.parentRunId": whole}
        one = known_id(self.run_dir, "mlflow", self.stage, lambda: new(self.stage, below))
        for run in (whole, one):
            client.set_terminated(run, "RUNNING")
        return MLFlowLogger(self.collection, tracking_uri=self.uri, run_id=one)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers of one step."""
        client = self.experiment
        known = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in metrics.items()}
        for name, value in known.items():
            client.log_metric(self.version, name, float(value), step=step or 0)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is with the run from its start."""

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], caption: list[str], step: int | None = None) -> None:
        """Pictures with their texts, `key/number.png` and `key/number.txt` by step."""
        client = self.experiment
        for number, (picture, text) in enumerate(zip(images, caption, strict=True)):
            file = f"{key}/{number}/step-{step or 0:06d}"
            client.log_image(self.version, picture, f"{file}.png")
            client.log_text(self.version, text, f"{file}.txt")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the runs, with what was measured at the end of the stage."""
        if self.inner is None:
            return
        if status == "success":
            values, cases = measured(self.run_dir, self.stage)
            self.log_metrics(values)
            for key, shown in cases.items():
                self.log_image(key, **case_pictures(shown))
        ended = "FINISHED" if status == "success" else "FAILED"
        whole = known_id(self.run_dir, "mlflow", "", str)
        for run in (self.version, whole):
            self.experiment.set_terminated(run, ended)


def known_id(run_dir: Path, tracker: str, stage: str, make: Callable[[], str]) -> str:
    """The id that a tracker has for a stage, made when it is asked for first."""
    file = run_dir / IDS
    ids = read_json(file, {})
    if stage not in ids.setdefault(tracker, {}):
        ids[tracker][stage] = make()
        write_json(file, ids)
    return ids[tracker][stage]


def _new_id() -> str:
    return secrets.token_hex(4)


def wandb_mode() -> str:
    """What WANDB_MODE says; without it "online" if there is a key, which W&B would ask for."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB)).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


def read_config(run_dir: Path) -> dict[str, Any]:
    """The resolved configuration of a run, as its folder has it."""
    file = run_dir / RUN_CONFIG
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def measured(run_dir: Path, stage: str) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """What a stage was measured to at its end: metrics, and right and wrong cases."""
    found = read_json(run_dir / "metrics.json", {}).get(stage, {})
    cases = read_json(run_dir / "stages" / stage / "cases.json", [])
    kinds = {f"{FINAL}right": True, f"{FINAL}wrong": False}
    shown = {key: [case for case in cases if case["right"] == one and case["png"]] for key, one in kinds.items()}
    values = {f"{FINAL}{name}": value for name, value in found.items()}
    return values, {key: some for key, some in shown.items() if some}


def _log_settings(client: Any, run: str, config: Mapping[str, Any]) -> None:
    """Settings as parameters, which MLflow compares; it takes a hundred at once."""
    from mlflow.entities import Param

    told = [(key, value) for key, value in flat(config) if not isinstance(value, Mapping)]
    found = [Param(re.sub(r"[^\w\-. :/]", "_", key), str(value)[:250]) for key, value in told]
    for start in range(0, len(found), 100):
        client.log_batch(run, params=found[start : start + 100])
