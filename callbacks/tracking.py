"""Measures the stage on held-out data while it trains, keeps its best weights, and ends it when
they get no better."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from callbacks.best_weights import BestWeights
from callbacks.checkpoint import end_stage
from callbacks.pictures import case_pictures, log_pictures
from lightning_internvl.console import console
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.distributed.collectives import gather_objects
from lightning_internvl.evaluation.own_data import OwnData, answer_scores, keep_cases
from lightning_internvl.evaluation.own_pairs import matching
from lightning_internvl.files import write_json
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.messages import ConfigError, did_you_mean
from lightning_internvl.report.metrics_table import CHANCE_SUFFIX
from lightning_internvl.report.read import TRACKED_CHANCE
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext

LEAST = 10  # scenes of recall at 10
NO_SCORE = (CHANCE_SUFFIX, "_samples", "_answers")  # ends of names


class Tracking(L.Callback):
    """Measures every so many steps: the stage's tasks on built-in scenes; of data of the user's own
    the loss on what is held out, and answers to its questions. Logs "val/<metric>", and right and
    wrong cases as pictures.

    Args:
        every_n_steps: optimizer steps between two times.
        times: where that is None: so many times, evenly over the stage. Both None never measures.
        samples: of each task, the first ones of those that are measured at the end; of one's own
            data so many, spread over what is held out.
        answers: questions of one's own data that are answered each time.
        best: metric whose best weights are kept in `RUN/best/<stage>/`, a hand-off folder; or such
            a metric for each stage by its name. None keeps none, nor does a stage that is not
            named.
        lowest: whether the lowest value is the best; None: of a loss it is.
        take_best: whether the stage ends with its best weights, which are then measured and handed
            over, and not with its last ones.
        patience: the stage ends after so many times without a better value, with its best weights;
            None: never before its last step.
        cases: how many right and how many wrong ones are logged as pictures.

    Raises:
        ValueError: for numbers out of range, `best` without a time to measure, and `take_best` or
            `patience` without `best`.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        times: int | None = None,
        samples: int = 50,
        answers: int = 16,
        best: str | Mapping[str, str] | None = None,
        lowest: bool | None = None,
        take_best: bool = False,
        patience: int | None = None,
        cases: int = 4,
    ) -> None:
        numbers: dict[str, tuple[int | None, int]] = {
            "every_n_steps": (every_n_steps, 1),
            "times": (times, 1),
            "samples": (samples, LEAST),
            "answers": (answers, 0),
            "patience": (patience, 1),
            "cases": (cases, 0),
        }
        faults = [
            f"{name}={value} must be {least} or more"
            for name, (value, least) in numbers.items()
            if value is not None and value < least
        ]
        if best is not None and every_n_steps is None and times is None:
            faults.append(f"{best=} needs every_n_steps=N or times=N: how often it is looked for")
        if best is None and (take_best or patience is not None):
            faults.append("take_best and patience need best=METRIC, by which weights are compared")
        if faults:
            raise ConfigError([f"callbacks.tracking.{fault}" for fault in faults])
        self.every_n_steps, self.times = every_n_steps, times
        self.samples, self.answers, self.cases = samples, answers, cases
        self.best, self.patience = best, patience
        self.take_best = take_best or patience is not None
        self.weights = BestWeights(lowest)
        self.own: OwnData | None = None
        self.first_loss: float | None = None  # on one's own data, before the first step
        self.ended_early = self.ended = False

    def state_dict(self) -> dict[str, Any]:
        own = {"first_loss": self.first_loss, "ended_early": self.ended_early}
        return {**own, "best": dict(self.weights.state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights.state = dict(state_dict["best"])
        self.first_loss, self.ended_early = state_dict["first_loss"], state_dict["ended_early"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Stage, checkpoint: Any) -> None:
        """A stage that has ended early does not go on."""
        if checkpoint["callbacks"].get(self.state_key, {}).get("ended_early"):
            end_stage(trainer, pl_module, checkpoint["global_step"])

    def setup_stage(self, context: StageContext) -> None:
        """Without held-out data nothing is measured."""
        self.context = context
        self.measures = self.every_n_steps is not None or self.times is not None
        scenes = context.predictor if self.measures else None
        self.predictor = None if scenes is None else _light(scenes, self.samples)

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """The value before the first step; a metric that does not exist is found here and not after
        a hundred steps."""
        self.own = OwnData.of(trainer, self.context) if self.measures else None
        times = self.times or 0
        self.steps = {round(pl_module.max_steps * time / times) for time in range(1, times + 1)}
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, self.every_n_steps
        last_of_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last_of_step and (step % every == 0 if every else step in self.steps):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self._end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Of a stage that was resumed after its last step, which does not train."""
        self._end(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, stage: Stage) -> None:
        if self.predictor is None and self.own is None:
            return
        journal = Journal(cases=self.cases)
        found: dict[str, float] = {}
        if self.own is not None:
            found |= self.own.loss(trainer, stage, self.samples)
        if trainer.is_global_zero or stage.is_sharded:
            found |= stage.use(self._scores, trainer, journal)
        found = gather_objects(found)[0]
        if trainer.global_step == 0:
            self.first_loss = found.get("validation_loss")
        best = self.best if isinstance(self.best, str | None) else self.best.get(stage.name)
        if best is not None and best not in found:
            names = [name for name in found if not name.endswith(CHANCE_SUFFIX)]
            lacking = f"stage {stage.name} has no such metric; {did_you_mean(best, names)}"
            several = "of several stages some are named with best={STAGE: METRIC}"
            raise ConfigError([f"callbacks.tracking.best={best}: {lacking}; {several}"])
        if trainer.is_global_zero:
            self._log(trainer, stage, found, journal)
        if best is not None:
            self.weights.see(trainer, stage, best, found[best], self.context.tokenizers)
            self._end_early(trainer, stage)

    def _end_early(self, trainer: L.Trainer, stage: Stage) -> None:
        """End a stage whose best value is too old."""
        step, last = trainer.global_step, stage.max_steps
        if self.patience and self.weights.state["waited"] >= self.patience and step < last:
            why = f"{self.patience} times without a better value"
            console.print(f"{stage.name}: ends at step {step} of {last}, {why}", soft_wrap=True)
            self.ended_early = True
            end_stage(trainer, stage, step)

    def _scores(self, trainer: L.Trainer, journal: Journal) -> dict[str, float]:
        """Of the tasks on scenes, and of answers about one's own data."""
        precision = trainer.precision_plugin.forward_context
        found: dict[str, float] = {}
        if self.predictor is not None:
            measuring = self.predictor.evaluating(precision, journal)
            with measuring as predictor, torch.random.fork_rng():
                for task in self.context.tasks.values():
                    found |= task(predictor)
        if self.own is not None:
            asked = self.own.ask(precision, self.answers)
            keep_cases(asked, journal)
            found |= answer_scores(asked) | matching(self.own, precision, journal, self.samples)
        return found

    def _log(self, trainer: L.Trainer, stage: Stage, found: Mapping[str, float], journal: Journal) -> None:
        step = max(0, trainer.global_step - 1)  # as Lightning counts what is logged after a step
        plain = {name.removeprefix("validation_"): value for name, value in found.items()}
        values = {f"val/{name}": value for name, value in plain.items() if not name.endswith(NO_SCORE)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        chances = {name.removesuffix(CHANCE_SUFFIX): value for name, value in plain.items() if name.endswith(CHANCE_SUFFIX)}
        if chances:  # of as many samples as the curves are measured on, fewer than those of metrics.json
            write_json(stage.folder / TRACKED_CHANCE, chances)
        for kind, right in {"val/right": True, "val/wrong": False}.items():
            if cases := [case for case in journal.shown if case["right"] == right]:
                log_pictures(trainer.loggers, kind, case_pictures(cases), step)

    def _end(self, trainer: L.Trainer, stage: Stage) -> None:
        if not self.ended:
            self.ended = True
            self.weights.end(trainer, stage, take=self.take_best)


def _light(predictor: Predictor, samples: int) -> Predictor:
    """A predictor of fewer samples."""
    light, data = copy.copy(predictor), predictor.held_out
    kinds = {"scenes": data.scenes, "questions": data.asked, "single": data.single}
    counts: dict[str, Any] = {kind: min(samples, count) for kind, count in kinds.items()}
    own: dict[str, Any] = {"seed": data.seed, "image_size": data.image_size, "styles": data.styles}
    light.held_out = HeldOutScenes(**own, **counts)
    return light
