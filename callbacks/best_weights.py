"""The weights of a stage with the best value of a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from lightning_internvl.checkpoints import handoff
from lightning_internvl.console import console
from lightning_internvl.distributed.collectives import gather_objects
from lightning_internvl.files import from_aside, read_json, write_json
from lightning_internvl.stages import Stage


class BestWeights:
    """Keeps them in `RUN/best/<stage>/`, a hand-off folder. All processes call each method alike.

    Args:
        lowest: whether the lowest value is the best; None: of a loss it is.

    Attributes:
        state: metric, value and step of the best weights, and how often since then no value was
            better (`waited`); it goes into checkpoints, so that a resumed run decides as one that
            was never stopped.
    """

    def __init__(self, lowest: bool | None) -> None:
        self.lowest = lowest
        self.state: dict[str, Any] = {}

    def see(
        self,
        trainer: L.Trainer,
        stage: Stage,
        metric: str,
        value: float,
        tokenizers: Mapping[str, Any],
    ) -> None:
        """Keep the weights as they are now, if this value, which all processes have, is better."""
        place, step = self._place(stage), trainer.global_step
        if trainer.is_global_zero:
            from_aside(place)  # of a process that was killed while it replaced them
        if "metric" not in self.state and step > 0:
            self._recall(metric, stage)
        if not self._is_better(metric, value):
            self.state["waited"] = self.state.get("waited", 0) + 1
            return
        self.state |= {"metric": metric, "value": value, "step": step, "waited": 0}
        if trainer.is_global_zero:
            known: dict[str, Any] = {"config": stage.parts, "plan": stage.plan, "base": stage.base}
            known |= {"tokenizers": tokenizers, "stage": stage.name, "step": step}
            handoff.save(stage.model, place, **known)
            write_json(self._note(stage), {"metric": metric, "value": value, "step": step})
        elif stage.is_sharded:
            handoff.gather_for_save(stage.model, stage.base)

    def _recall(self, metric: str, stage: Stage) -> None:
        """What a run whose checkpoint does not say it has noted."""
        there = self._place(stage).exists()
        before = gather_objects(read_json(self._note(stage), {}) if there else {})[0]
        if before.get("metric") == metric and not math.isnan(before["value"]):
            self.state |= before

    def _is_better(self, metric: str, value: float) -> bool:
        best = self.state.get("value")
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        lowest = "loss" in metric if self.lowest is None else self.lowest
        return value < best if lowest else value > best

    def end(self, trainer: L.Trainer, stage: Stage, *, take: bool) -> None:
        """At the end of a stage: say which weights were the best.

        Args:
            take: whether the stage goes on with them, to be measured and handed over.
        """
        if "value" not in self.state:
            return
        step, last, place = self.state["step"], trainer.global_step, self._place(stage)
        best = f"best {self.state['metric']} {self.state['value']:.4g} at step {step} of {last}"
        if take and step != last:
            handoff.restore(stage.model, place)
            stage.weights_step = step
        does = "these weights are handed over" if take else f"kept in {place}"
        console.print(f"{stage.name}: {best}; {does}", soft_wrap=True)
        if take and step == 0 < last:
            tries = "a lower optimizer.lr, more data, or callbacks.tracking.take_best=false"
            console.print(f"{stage.name}: training has made it no better; try {tries}", soft_wrap=True)

    @staticmethod
    def _place(stage: Stage) -> Path:
        return stage.run_dir / "best" / stage.name

    @staticmethod
    def _note(stage: Stage) -> Path:
        return stage.folder / "best.json"
