"""The table over the jobs of a sweep (`--multirun`), and the metric that a search looks at."""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from lightning_internvl.console import console
from lightning_internvl.files import CONF, read_json, write_json, write_text
from lightning_internvl.launch import is_helper
from lightning_internvl.messages import ConfigError, did_you_mean, told

JOBS = ".jobs"  # in a sweep's folder: a file a job
TABLE = "sweep"  # the name of the files with the table, sweep.csv and sweep.md
BEST = "best"  # the name of the best value of callbacks.tracking.best
CHANCE = "_chance"  # ends the name of the level of a metric that chance would reach
SHOWN = 4  # metrics on the screen; the files have all
ERROR = 120  # characters of an error in the table
SLURM = "hydra/launcher=submitit_slurm"
OWN, STATE = "objective", "state"

_begun: list[Path] = []  # folders of sweeps whose table is not written yet


class SweepTable(Callback):
    """Notes each job of a sweep, in whatever process it runs, and ends the sweep with a table."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Jobs that a launcher starts elsewhere find this project too."""
        _begun.append(Path(config.hydra.sweep.dir))
        known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if str(CONF.parent) not in known:
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CONF.parent), *known)))
        # what Optuna's database tells of itself
        logging.getLogger("alembic").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=r".*declarative_base\(\).*")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A job that is killed leaves this."""
        _note(config, "stopped")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """How it ended."""
        failed = job_return.status == JobStatus.FAILED
        error = str(job_return._return_value).strip() if failed else ""
        first = next(iter(error.splitlines()), "") or type(job_return._return_value).__name__
        _note(config, f"failed: {first[:ERROR]}" if failed else "finished")


def _note(config: DictConfig, state: str) -> None:
    run = config.hydra.mode is not None and config.hydra.mode.name == "RUN"
    looks = config.plan or config.doctor or config.data.get("validate")  # and writes nothing
    if run or looks or is_helper():
        return
    words = [told(word) for word in config.hydra.overrides.task]
    folder, place = Path(config.hydra.sweep.dir), config.hydra.runtime.output_dir
    about = {"settings": words, STATE: told(state), "run": place, OWN: config.objective_metric}
    write_json(folder / JOBS / f"{config.hydra.job.num}.json", about)


@contextmanager
def sweep_table() -> Iterator[None]:
    """Write and print the table of the sweep that has run inside, however it ended.

    Raises:
        ConfigError: for what a plugin cannot do here.
    """
    if faults := list(_launch_faults(sys.argv)):
        raise ConfigError(faults)
    try:
        yield
    finally:
        while _begun:
            if rows := rows_of(folder := _begun.pop()):
                _write(folder, rows)


def _launch_faults(words: Sequence[str]) -> Iterator[str]:
    if not {"-m", "--multirun"} & set(words):
        return
    if SLURM in words and not shutil.which("srun"):
        advice = "start it where jobs are submitted; hydra/launcher=submitit_local starts them here"
        yield f"{SLURM}: there is no srun on this machine; {advice}"
    for word in words:
        if word.startswith("hydra.sweeper.storage="):
            reason = "the plugin's Optuna (2.10) keeps no study in a database of SQLAlchemy 2"
            yield f"{word}: {reason}; leave it out, sweep.csv in the sweep's folder has all trials"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A row for each job: its number, the settings that differ between jobs, its state, and the
    metrics of its last stage; those of the search, if there are any, come first."""
    files = sorted((folder / JOBS).glob("*.json"), key=lambda file: int(file.stem))
    jobs = [read_json(file, {}) for file in files]
    settings = [_by_name(job["settings"]) for job in jobs]
    names = list(dict.fromkeys(name for one in settings for name in one))
    differing = [name for name in names if len({one.get(name) for one in settings}) > 1]
    rows = []
    for file, job, own in zip(files, jobs, settings, strict=True):
        chosen = {name: own.get(name, "") for name in differing or names}
        rows.append({"job": int(file.stem), **chosen, STATE: job[STATE], **_metrics(job)})
    return rows


def _by_name(words: Iterable[str]) -> dict[str, str]:
    """The words of a command line as setting and value."""
    pairs = (word.lstrip("+").partition("=") for word in words)
    return {name: value for name, _, value in pairs}


def _metrics(job: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that a search looks at, and those of the last stage that has any."""
    found, wanted = metrics_of(Path(job["run"])), named(job[OWN])
    last = next((name.partition("/")[0] for name in reversed(found)), "")
    first = {name: found[name] for name in wanted if name in found}
    rest = {name: value for name, value in found.items() if name.startswith(f"{last}/")}
    return first | rest


def metrics_of(run: Path) -> dict[str, float]:
    """The metrics of a run as STAGE/METRIC, in the order of its stages; STAGE/best is the best
    value of the metric whose weights were kept."""
    found: dict[str, float] = {}
    for stage, metrics in read_json(run / "metrics.json", {}).items():
        scores = {name: value for name, value in metrics.items() if not name.endswith(CHANCE)}
        best = read_json(run / "stages" / stage / "best.json", {})
        scores |= {BEST: best["value"]} if "value" in best else {}
        found |= {f"{stage}/{name}": value for name, value in scores.items()}
    return found


def check_search(hydra_config: Any, objective: Any) -> None:
    """Refuse a search that has nothing to look at, before its first job trains.

    Raises:
        ConfigError: with the setting that is missing.
    """
    searched = "optuna" in str(hydra_config.sweeper.get("_target_")).lower()
    if searched and hydra_config.mode.name == "MULTIRUN" and not named(objective):
        advice = "objective_metric=STAGE/METRIC says what to look for"
        raise ConfigError([f"hydra/sweeper=optuna needs a metric; {advice}, as supervised/answers_accuracy"])


def named(objective: Any) -> list[str]:
    """`objective_metric` as a list."""
    return [] if objective is None else [objective] if isinstance(objective, str) else list(objective)


def objective_of(run: Path, objective: Any) -> float | tuple[float, ...] | None:
    """The value of `objective_metric`, or those of several; None without one. It is printed.

    Raises:
        ConfigError: for a metric that the run does not have.
    """
    found, names = metrics_of(run), named(objective)
    for name in names:
        if name not in found:
            raise ConfigError([f"objective_metric={name}: {run} has no such metric; {did_you_mean(name, found)}"])
        console.print(f"{OWN:12} {name} = {found[name]:.4g}", soft_wrap=True, markup=False)
    values = tuple(float(found[name]) for name in names)
    return None if not names else values[0] if isinstance(objective, str) else values


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / f"{TABLE}.csv", text.getvalue())
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    cells = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    write_text(folder / f"{TABLE}.md", "\n".join(cells) + "\n")
    _show(columns, rows)
    console.print(f"{'table':12} {folder / TABLE}.csv, {TABLE}.md", soft_wrap=True, markup=False)


def _show(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """The table with its first metrics, and why jobs have failed."""
    last = columns.index(STATE) + 1 + SHOWN
    table = Table(header_style="bold")
    for name in columns[:last]:
        table.add_column(Text(name.replace("/", "\n")), overflow="fold")
    for row in rows:
        short = {**row, STATE: row[STATE].partition(":")[0]}
        table.add_row(*(Text(_cell(short.get(name))) for name in columns[:last]))
    console.print(table)
    for row in rows:
        if ":" in row[STATE]:
            console.print(f"job {row['job']} {row[STATE]}", soft_wrap=True, markup=False)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
