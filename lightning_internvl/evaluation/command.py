"""What `evaluate.py` does: every task with the model that can do it, and files of results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_internvl.console import console
from lightning_internvl.evaluation.models import ModelUnderTest, model_for, models_under_test
from lightning_internvl.evaluation.replay import check_replay, how_asked, read_record
from lightning_internvl.evaluation.settings import EvaluationSettings, folder_of
from lightning_internvl.evaluation.stage_tasks import StageTasks
from lightning_internvl.files import read_json, write_json
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.messages import hidden
from lightning_internvl.model.compose import Build, Config
from lightning_internvl.report.evaluation_page import write_page
from lightning_internvl.report.metrics_table import metrics_table

OPEN = ("samples", "max_missing")  # settings that change no answer
METRICS, RECORD, ANSWERS, CASES = "metrics.json", "record.json", "predictions.jsonl", "cases.json"


class EvalJob(NamedTuple):
    """A task, the model that it measures, and what was asked for."""

    name: str
    task: Any
    model: ModelUnderTest
    settings: Config


def run_evaluation(given: Mapping[str, Any], build: Build) -> None:
    """Do what the settings ask for; raises ValueError for what cannot be opened or measured."""
    settings = EvaluationSettings.of(given)
    tasks = {name: build(node) for name, node in settings.task.items()}
    folder, models = folder_of(given), models_under_test(settings, build)
    of_tasks = [_jobs(name, task, models, settings.task[name]) for name, task in tasks.items()]
    jobs = [job for jobs in of_tasks for job in jobs]
    found: dict[str, Any] = {}
    for model in models:  # each that a task needs is loaded once, and one at a time
        own = [job for job in jobs if job.model is model]
        if not own:
            continue
        predictor = model.open()
        for job in own:
            found[job.name] = _measure(job, predictor, folder / job.name, settings, build)
            write_json(folder / METRICS, read_json(folder / METRICS, {}) | {job.name: found[job.name]})
        del predictor
    page = write_page(folder)
    results = {job.name: found[job.name] for job in jobs}
    console.print(metrics_table(results, title="Results", group="task", samples=True))
    places = f"answers, settings and numbers: {folder}\nright and wrong cases: {page}"
    console.print(places, soft_wrap=True, markup=False)
    if settings.record is not None:
        (job,) = jobs
        again = read_json(folder / job.name / RECORD)
        told = check_replay(read_record(Path(settings.record)), again, settings.record)
        console.print(told, soft_wrap=True, markup=False)


def _jobs(name: str, task: Any, models: list[ModelUnderTest], settings: Config) -> Iterator[EvalJob]:
    if not isinstance(task, StageTasks):
        yield EvalJob(name, task, model_for(name, getattr(task, "needs", None), models), settings)
        return
    for model in models:
        if model.tasks is None:
            yield EvalJob(name, task, model, settings)
        elif any(model.tasks.values()):
            own = partial(task.of, model.tasks)
            yield EvalJob(f"{name}/{model.name}", own, model, settings | {"tasks": model.tasks})


def _measure(job: EvalJob, predictor: Predictor, folder: Path, settings: EvaluationSettings, build: Build) -> dict[str, float]:
    """The numbers of a task; its record, answers and cases are written to its folder."""
    console.print(f"{job.name}: {job.model.place}", soft_wrap=True, markup=False)
    record = {**_record(job, settings), "asked": hidden(how_asked(settings, job.model.place))}
    if settings.record is not None:  # all is asked again
        (folder / ANSWERS).unlink(missing_ok=True)
    _forget_others(folder, record)
    write_json(folder / RECORD, record)
    journal, begun = Journal(folder / ANSWERS, settings.cases), time.monotonic()
    with predictor.evaluating(journal=journal):
        found = job.task(predictor, build) if isinstance(job.task, partial) else job.task(predictor)
    seconds = round(time.monotonic() - begun, 2)
    write_json(folder / RECORD, {**record, **journal.record(), "seconds": seconds, "metrics": found})
    write_json(folder / CASES, journal.shown)
    return found


def _record(job: EvalJob, settings: EvaluationSettings) -> Config:
    """What the answers of a task depend on, beside the questions and pictures of its files."""
    model = {"place": job.model.place, "weights": job.model.weights, "dtype": job.model.dtype}
    reading = {name: value for name, value in settings.reading.items() if value is not None}
    return hidden({"task": job.name, "settings": job.settings, "model": model | reading})


def _forget_others(folder: Path, record: Config) -> None:
    """Remove answers that were given under other settings."""
    before = read_json(folder / RECORD)
    if before is not None and not _same(before, record) and (folder / ANSWERS).exists():
        (folder / ANSWERS).unlink()
        why = "asked again, for the settings or the weights have changed"
        console.print(f"{folder / ANSWERS}: {why}", soft_wrap=True, markup=False)


def _same(one: Config, two: Config) -> bool:
    return all(_answered_by(one, key) == _answered_by(two, key) for key in ("settings", "model"))


def _answered_by(record: Config, key: str) -> Config:
    return {name: value for name, value in record[key].items() if name not in OPEN}
