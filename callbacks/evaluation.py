"""Measures the stage on held-out data when it has ended."""

from __future__ import annotations

import time

import lightning as L

from lightning_internvl.files import read_json, write_json
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Metrics
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext


class Evaluation(L.Callback):
    """Runs the stage's tasks and writes their metrics to `metrics.json`.

    Args:
        cases: how many right and how many wrong ones the report shows.
    """

    def __init__(self, *, cases: int = 0) -> None:
        self.cases = cases

    def setup_stage(self, context: StageContext) -> None:
        """Without held-out data nothing is measured."""
        self.tasks, self.predictor = context.tasks, context.predictor

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        measured = self.predictor is not None and (trainer.is_global_zero or pl_module.is_sharded)
        found = dict(pl_module.measured) | (self._measured(trainer, pl_module) if measured else {})
        if (measured or found) and trainer.is_global_zero:
            metrics = read_json(pl_module.run_dir / "metrics.json", {})
            write_json(pl_module.run_dir / "metrics.json", metrics | {pl_module.name: found})

    def _measured(self, trainer: L.Trainer, pl_module: Stage) -> Metrics:
        """What the tasks find. Writes the cases, and how long it took."""
        assert self.predictor is not None  # or there is nothing to measure on
        if not pl_module.is_sharded:
            # the trainer's teardown has moved it to the CPU
            pl_module.model.to(trainer.strategy.root_device)
        journal, begun = Journal(cases=self.cases), time.monotonic()
        found: Metrics = {}
        with self.predictor.evaluating(trainer.precision_plugin.forward_context, journal) as predictor:
            for task in self.tasks.values():
                found |= pl_module.use(task, predictor)
        if not trainer.is_global_zero:
            return found
        timing = read_json(pl_module.run_dir / "timing.json", {})
        if journal.shown:
            write_json(pl_module.folder / "cases.json", journal.shown)
        timing.setdefault(pl_module.name, {})["eval_seconds"] = round(time.monotonic() - begun, 2)
        write_json(pl_module.run_dir / "timing.json", timing)
        return found
