"""Measures the stage on held-out data when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import lightning as L

from lightning_internvl.files import read_json, write_json
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.stages import Stage


class Evaluation(L.Callback):
    """Runs the stage's tasks and writes their metrics to `metrics.json`.

    Args:
        cases: how many right and how many wrong ones the report shows.
        tasks: tasks by name (see `lightning_internvl.evaluation.tasks`).
        bench: the model with its collators and held-out data; None measures nothing.
    """

    def __init__(
        self, *, tasks: Mapping[str, Callable[[Predictor], dict[str, float]]], bench: Predictor | None = None, cases: int = 0
    ) -> None:
        self.tasks, self.bench, self.cases = dict(tasks), bench, cases

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        if self.bench is None or not (trainer.is_global_zero or pl_module.is_sharded):
            return
        if not pl_module.is_sharded:
            pl_module.model.to(trainer.strategy.root_device)  # the trainer's teardown has moved it to the CPU
        begun, found = time.monotonic(), {}
        self.bench.journal = Journal(cases=self.cases)
        with self.bench.evaluating(trainer.precision_plugin.forward_context) as bench:
            for task in self.tasks.values():
                found |= pl_module.use(task, bench)
        if not trainer.is_global_zero:
            return
        metrics, timing = (read_json(pl_module.run_dir / name, {}) for name in ("metrics.json", "timing.json"))
        write_json(pl_module.run_dir / "metrics.json", metrics | {pl_module.name: found})
        if self.bench.journal.shown:
            write_json(pl_module.folder / "cases.json", self.bench.journal.shown)
        timing.setdefault(pl_module.name, {})["eval_seconds"] = round(time.monotonic() - begun, 2)
        write_json(pl_module.run_dir / "timing.json", timing)
