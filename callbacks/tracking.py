"""Measures the stage on a few held-out samples while it trains, and keeps its best weights."""

from __future__ import annotations

import base64
import copy
import io
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image

from lightning_internvl.checkpoints import handoff
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.files import from_aside, read_json, write_json
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Metrics, Predictor
from lightning_internvl.messages import ConfigError, did_you_mean
from lightning_internvl.report.metrics_table import CHANCE_SUFFIX
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext

LEAST = 10  # scenes of recall at 10


class Tracking(L.Callback):
    """Runs the stage's tasks every so many steps, logs their metrics as "val/<metric>" and right
    and wrong cases as pictures.

    Args:
        every_n_steps: optimizer steps between two times; None never measures.
        samples: of each task, the first ones of those that are measured at the end.
        best: metric whose best weights are kept in `RUN/best/<stage>/`, a hand-off folder; or such
            a metric for each stage by its name. None keeps none, nor does a stage that is not
            named.
        lowest: whether the lowest value is the best.
        cases: how many right and how many wrong ones are logged as pictures.

    Raises:
        ValueError: for numbers below 1, and `best` without `every_n_steps`.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        samples: int = 50,
        best: str | Mapping[str, str] | None = None,
        lowest: bool = False,
        cases: int = 4,
    ) -> None:
        faults = {
            f"{every_n_steps=} must be 1 or more": every_n_steps is not None and every_n_steps < 1,
            f"{samples=} must be {LEAST} or more": samples < LEAST,
            f"{cases=} must be 0 or more": cases < 0,
        }
        if found := [f"callbacks.tracking.{fault}" for fault, is_one in faults.items() if is_one]:
            raise ConfigError(found)
        if best is not None and every_n_steps is None:
            raise ValueError(f"callbacks.tracking.{best=} needs every_n_steps=N: how often it is looked for")
        self.every_n_steps, self.samples = every_n_steps, samples
        self.best, self.lowest, self.cases = best, lowest, cases

    def setup_stage(self, context: StageContext) -> None:
        """Without held-out data nothing is measured."""
        self.tasks, self.tokenizers = context.tasks, context.tokenizers
        whole = context.predictor if self.every_n_steps else None
        self.predictor = None if whole is None else _light(whole, self.samples)

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """The value before the first step; a metric that does not exist is found here and not after
        a hundred steps."""
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        last_of_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last_of_step and self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, stage: Stage) -> None:
        if self.predictor is None or not (trainer.is_global_zero or stage.is_sharded):
            return
        found: Metrics = {}
        journal = Journal(cases=self.cases)
        measuring = self.predictor.evaluating(trainer.precision_plugin.forward_context, journal)
        with measuring as predictor, torch.random.fork_rng():
            for task in self.tasks.values():
                found |= stage.use(task, predictor)
        best = self.best if isinstance(self.best, str | None) else self.best.get(stage.name)
        if best is not None and best not in found:
            names = [name for name in found if not name.endswith(CHANCE_SUFFIX)]
            fault = f"callbacks.tracking.best={best}: stage {stage.name} has no such metric"
            several = "of several stages some are named with best={STAGE: METRIC}"
            raise ConfigError([f"{fault}; {did_you_mean(best, names)}; {several}"])
        if trainer.is_global_zero:
            self._log(trainer, found, journal)
        if best is not None:
            self._keep(trainer.global_step, stage, best, found[best], trainer.is_global_zero)

    def _log(self, trainer: L.Trainer, found: Mapping[str, float], journal: Journal) -> None:
        step = max(0, trainer.global_step - 1)  # as Lightning counts what is logged after a step
        values = {f"val/{n}": value for n, value in found.items() if not n.endswith(CHANCE_SUFFIX)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
            for right in (True, False):
                cases = [case for case in journal.shown if case["right"] == right]
                if cases:
                    _log_pictures(logger, "right" if right else "wrong", cases, step)

    def _keep(self, step: int, stage: Stage, metric: str, value: float, first: bool) -> None:
        """Replace the best weights, if these are better; all processes have the same value."""
        place, note = stage.run_dir / "best" / stage.name, stage.folder / "best.json"
        from_aside(place)  # of a process that was killed while it replaced them
        before = read_json(note, {}) if place.exists() else {}
        known = before.get("value") if before.get("metric") == metric else None
        better = known is None or math.isnan(known) or (value < known if self.lowest else value > known)
        if math.isnan(value) or not better:
            return
        if not first:
            handoff.gather_for_save(stage.model, stage.base)
            return
        known = {"config": stage.parts, "plan": stage.plan, "tokenizers": self.tokenizers, "base": stage.base}
        handoff.save(stage.model, place, stage=stage.name, step=step, **known)
        write_json(note, {"metric": metric, "value": value, "step": step})


def _light(predictor: Predictor, samples: int) -> Predictor:
    """A predictor of fewer samples."""
    light, data = copy.copy(predictor), predictor.held_out
    kinds = {"scenes": data.scenes, "questions": data.asked, "single": data.single}
    counts: dict[str, Any] = {kind: min(samples, count) for kind, count in kinds.items()}
    own: dict[str, Any] = {"seed": data.seed, "image_size": data.image_size, "styles": data.styles}
    light.held_out = HeldOutScenes(**own, **counts)
    return light


def _log_pictures(logger: Any, kind: str, cases: list[dict[str, Any]], step: int) -> None:
    """Cases to a logger that takes pictures: TensorBoard's, and those with `log_image` (W&B)."""
    files = [io.BytesIO(base64.b64decode(case["png"])) for case in cases]
    pictures = [np.array(Image.open(file).convert("RGB")) for file in files]
    said = [f"{case['question']} {case['answer']} (true: {case['truth']})" for case in cases]
    if hasattr(logger, "log_image"):
        logger.log_image(key=f"val/{kind}", images=pictures, caption=said, step=step)
    elif hasattr(logger.experiment, "add_image"):
        for number, (picture, text) in enumerate(zip(pictures, said, strict=True)):
            logger.experiment.add_image(f"{kind}/{number}", picture, step, dataformats="HWC")
            logger.experiment.add_text(f"{kind}/{number}", text, step)
