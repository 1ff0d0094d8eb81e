"""Saves the stage so that a kill costs at most `every_n_steps` steps of work, a signal none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Timer
from torch.distributed.checkpoint import CheckpointException

from lightning_internvl.distributed.signals import NOT_FINISHED, WATCH, RunStopped
from lightning_internvl.files import DRAFT, into_place, remove
from lightning_internvl.stages import Stage


class Checkpoint(L.Callback):
    """Writes `checkpoints/<stage>/last.ckpt`, a file or a folder, beside its place and moves it
    there when it is whole.

    After a signal (SIGTERM, Ctrl-C), and when a time limit or another callback ends training early,
    the step at work is finished and saved, and the run ends as `RunStopped`: nothing is measured or
    handed over.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the last step of a stage is always
            saved.
    """

    def __init__(self, *, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint {every_n_steps=} must be at least 1")
        self.every_n_steps = every_n_steps
        self.saved = -1
        self.signal, self.stopping = 0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        WATCH.begin()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.stopping |= trainer.should_stop
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # amid the micro-batches of a step
            trainer.should_stop = False
            return
        step, self.signal = trainer.global_step, _agreed(WATCH.received, pl_module)
        self.stopping |= bool(self.signal)
        if step != self.saved and (self.stopping or step % self.every_n_steps == 0 or step == pl_module.max_steps):
            self.save(trainer, pl_module.checkpoint)
            self.saved = step
        trainer.should_stop = self.stopping

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """After the last step of this process, which has been logged.

        Raises:
            RunStopped: if it is not the last one of the stage, or a signal ends the run.
        """
        if self.signal:
            raise RunStopped.by(self.signal)
        check_finished(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        WATCH.end()
        if WATCH.received:  # since the last step
            raise RunStopped.by(WATCH.received)

    def on_exception(self, trainer: L.Trainer, pl_module: Stage, exception: BaseException) -> None:
        WATCH.end()

    @staticmethod
    def save(trainer: L.Trainer, path: Path) -> None:
        """All processes take part; the first one moves the result into place.

        Raises:
            ValueError: if it cannot be written; the checkpoint before it is untouched.
        """
        draft = path.with_name(f".{path.name}{DRAFT}")  # one name for all processes
        if trainer.is_global_zero:
            remove(draft)  # of a process that was killed
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(draft, weights_only=False)
        except (OSError, RuntimeError, CheckpointException) as error:
            if trainer.is_global_zero:
                remove(draft)
            before = f"{path} of an earlier step is whole" if path.exists() else "no other exists"
            lost = f"the checkpoint of step {trainer.global_step} cannot be written"
            raise ValueError(f"{lost}: {_reason(error)}; {before}") from error
        if trainer.is_global_zero:
            into_place(draft, path)
        trainer.strategy.barrier()


def check_finished(trainer: L.Trainer, stage: Stage) -> None:
    """Raises RunStopped if the stage has not done its last step."""
    if trainer.global_step >= stage.max_steps:
        return
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # of a connector
    left = [one.time_remaining() for one in callbacks if isinstance(one, Timer)]
    over = any(seconds is not None and seconds <= 0 for seconds in left)
    raise RunStopped("not finished: trainer.max_time is over" if over else "not finished: training was ended early", NOT_FINISHED)


def end_stage(trainer: L.Trainer, stage: Stage, step: int) -> None:
    """Let this step be the last one of the stage, which has then finished. All processes must do so
    after the same step."""
    stage.max_steps = step
    trainer.fit_loop.epoch_loop.max_steps = step


def _agreed(received: int, stage: Stage) -> int:
    """The signal that any process has received, so that all end after the same step. Of several
    processes the trainer waits for the device in each step anyway, where it tells the others of its
    own signals."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return received
    seen = torch.full((1,), received, dtype=torch.int32, device=stage.device)
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return int(seen)


def _reason(error: BaseException) -> str:
    """What went wrong, in the first process in which something did."""
    failures = getattr(error, "failures", None)
    return str(next(iter(failures.values()))[0] if failures else error)
