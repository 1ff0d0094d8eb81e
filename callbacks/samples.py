"""Keeps what the model makes of a few fixed pictures at several times of its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L

from callbacks.pictures import log_pictures, sample_pictures
from lightning_internvl.evaluation.own_data import OwnData, answer_relevance, sample_of
from lightning_internvl.evaluation.own_pairs import pairs_predictor
from lightning_internvl.evaluation.probe_samples import POOL, sample
from lightning_internvl.files import write_json
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext


class Samples(L.Callback):
    """Writes `stages/<stage>/samples/step-*.json`, and logs the pictures where loggers take any.

    Args:
        at: moments, as shares of the stage; the start (0) and the end (1) among them if wanted.
        images: how many pictures.
        relevance: whether it is found what in them scores hang on, a forward and a backward pass
            for each; never of weights that are divided among processes.
    """

    def __init__(self, *, at: Sequence[float], images: int, relevance: bool = True) -> None:
        self.at, self.images, self.relevance = tuple(at), images, relevance

    def setup_stage(self, context: StageContext) -> None:
        """Without held-out data nothing is kept."""
        self.predictor, self.shown, self.context = context.predictor, context.settings.samples, context

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self.steps = {round(share * pl_module.max_steps) for share in self.at}
        if trainer.global_step == 0 and 0 in self.steps:
            self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        last_of_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last_of_step and trainer.global_step in self.steps:
            self._keep(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Of a stage that has ended early its end."""
        if 1 in self.at and trainer.global_step not in self.steps:
            self._keep(trainer, pl_module)

    def _keep(self, trainer: L.Trainer, stage: Stage) -> None:
        if not (trainer.is_global_zero or stage.is_sharded):
            return
        step, precision = trainer.global_step, trainer.precision_plugin.forward_context
        own = OwnData.of(trainer, self.context) if self.predictor is None else None
        chosen = self.predictor if own is None else pairs_predictor(own, POOL)
        relevance = self.relevance and not stage.is_sharded  # backward passes would wait for all processes
        found: dict[str, Any] = {}
        # a probe neither compares pictures and texts nor writes
        if chosen is not None and (self.shown.writer is not None or chosen.pairs is not None):
            options = {**dataclasses.asdict(self.shown), "images": self.images, "relevance": relevance}
            with chosen.evaluating(precision) as predictor:
                found = stage.use(partial(sample, predictor, stage=stage.name, step=step, **options))
        elif own is not None and (asked := stage.use(own.ask, precision, self.images)):
            found = {"stage": stage.name, "step": step, **sample_of(asked)}
            found |= answer_relevance(own.view, precision, asked) if relevance else {}
        if found and trainer.is_global_zero:
            self._write(trainer, stage, found)

    def _write(self, trainer: L.Trainer, stage: Stage, found: dict[str, Any]) -> None:
        step = trainer.global_step
        write_json(stage.folder / "samples" / f"step-{step:06d}.json", found)
        # the step as Lightning counts what is logged after it
        log_pictures(trainer.loggers, "samples", sample_pictures(found), max(0, step - 1))
