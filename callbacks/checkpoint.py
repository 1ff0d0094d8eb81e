"""Saves the stage so that a kill at any time costs at most `every_n_steps` steps of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch.distributed.checkpoint import CheckpointException

from lightning_internvl.files import into_place, remove
from lightning_internvl.stages import Stage


class Checkpoint(L.Callback):
    """Writes `checkpoints/<stage>/last.ckpt`, a file or a folder, beside its place and moves it there when it is whole.

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
        """All processes take part; the first one moves the result into place.

        Raises:
            ValueError: if it cannot be written; the checkpoint before it is untouched.
        """
        draft = path.with_name("." + path.name + ".draft")
        if trainer.is_global_zero:
            remove(draft)  # of a process that was killed
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(draft, weights_only=False)
        except (OSError, RuntimeError, CheckpointException) as error:
            if trainer.is_global_zero:
                remove(draft)
            before = f"{path} of an earlier step is whole" if path.exists() else "there is none of an earlier step"
            raise ValueError(
                f"the checkpoint of step {trainer.global_step} cannot be written: {_reason(error)}; {before}"
            ) from error
        if trainer.is_global_zero:
            into_place(draft, path)
        trainer.strategy.barrier()


def _reason(error: BaseException) -> str:
    """What went wrong, in the first process in which something did."""
    failures = getattr(error, "failures", None)
    return str(next(iter(failures.values()))[0] if failures else error)
