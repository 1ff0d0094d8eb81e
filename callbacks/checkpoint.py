"""Saves the stage so that a kill at any time costs at most `every_n_steps` steps of work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L

from lightning_internvl.stages import Stage


class Checkpoint(L.Callback):
    """Writes `checkpoints/<stage>/last.ckpt` beside its place and moves it there in one step.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the last step of a stage is always saved.
    """

    def __init__(self, *, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint {every_n_steps=} must be at least 1")
        self.every_n_steps = every_n_steps
        self.saved = -1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self.saved and (step % self.every_n_steps == 0 or step == pl_module.max_steps):
            self.save(trainer, pl_module.checkpoint)
            self.saved = step

    @staticmethod
    def save(trainer: L.Trainer, path: Path) -> None:
        """All processes take part; the first one moves the result into place."""
        draft = path.with_name("." + path.name + ".draft")
        trainer.save_checkpoint(draft, weights_only=False)
        if trainer.is_global_zero:
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(draft, path)
        trainer.strategy.barrier()
