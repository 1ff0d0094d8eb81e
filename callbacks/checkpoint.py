"""Saves the stage so that a kill costs a few minutes or steps of work, a signal none."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Timer
from torch.distributed.checkpoint import CheckpointException

from lightning_internvl.console import console
from lightning_internvl.distributed.checkpoint_writing import Writer, begin_write
from lightning_internvl.distributed.signals import NOT_FINISHED, WATCH, RunStopped
from lightning_internvl.files import DRAFT, errno_of, remove
from lightning_internvl.messages import check_number
from lightning_internvl.stages import Stage

FAILURES = (OSError, RuntimeError, CheckpointException)  # of writing


class Checkpoint(L.Callback):
    """Writes `checkpoints/<stage>/last.ckpt`, a file or a folder, beside its place and moves it
    there when it is whole. Training goes on meanwhile: it waits for a copy in the host's memory, and
    for the file at the end of a stage or where the next one is due already.

    After a signal (SIGTERM, Ctrl-C), and when a time limit or another callback ends training early,
    the step at work is finished and saved, and the run ends as `RunStopped`: nothing is measured or
    handed over.

    Args:
        every_n_minutes: between two checkpoints; None: time makes none.
        every_n_steps: optimizer steps between two checkpoints; None: steps make none. The last step
            of a stage is always saved.
    """

    def __init__(self, *, every_n_minutes: float | None = None, every_n_steps: int | None = None) -> None:
        for name, value in {"every_n_minutes": every_n_minutes, "every_n_steps": every_n_steps}.items():
            if value is not None:
                check_number(f"callbacks.checkpoint.{name}", value, above=0, whole=name == "every_n_steps")
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self.saved = self.step = -1  # the last one that was begun
        self.signal, self.stopping = 0, False
        self.writer = Writer()
        self.begun = self.last = 0.0  # when the stage and its last checkpoint began
        self.stood, self.told = 0.0, False  # seconds in which training has waited

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self.begun = self.last = time.monotonic()
        WATCH.begin()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.stopping |= trainer.should_stop
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # amid the micro-batches of a step
            trainer.should_stop = False
            return
        step = trainer.global_step
        self.signal, due = _agreed(WATCH.received, self._is_due(step), pl_module)
        self.stopping |= bool(self.signal)
        last = self.stopping or step == pl_module.max_steps
        if step != self.saved and (last or due):
            self.save(trainer, pl_module.checkpoint)
            self.saved = step
        if last:
            self.wait(trainer, pl_module.checkpoint)
        trainer.should_stop = self.stopping
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # of a connector
        if self.stopping and every and step % every and (results := trainer._results) is not None:
            results.reset()  # or Lightning would log, as of this step, what an earlier one has left

    def _is_due(self, step: int) -> bool:
        minutes = (time.monotonic() - self.last) / 60
        by_time = self.every_n_minutes is not None and minutes >= self.every_n_minutes
        return by_time or (self.every_n_steps is not None and step % self.every_n_steps == 0)

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
            raise RunStopped.by(WATCH.received, alone=True)

    def on_exception(self, trainer: L.Trainer, pl_module: Stage, exception: BaseException) -> None:
        WATCH.end()
        with contextlib.suppress(*FAILURES):  # the exception is what is told
            self.writer.wait()

    def save(self, trainer: L.Trainer, path: Path) -> None:
        """Take a copy of the stage, and begin to write it; all processes take part.

        Raises:
            ValueError: if an earlier one could not be written, or this one cannot be begun.
        """
        self.wait(trainer, path)
        self.last = time.monotonic()
        draft = _draft(path)
        if trainer.is_global_zero:
            remove(draft)  # of a process that was killed
            path.parent.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        divided = getattr(trainer.strategy, "begin_write", None)  # each process writes its share
        self.step = trainer.global_step
        try:
            if divided is not None:
                self.writer.begin(divided(state, draft), draft, path, moves=trainer.is_global_zero)
            elif trainer.is_global_zero:
                self.writer.begin(begin_write(state, draft), draft, path, moves=True)
        except FAILURES as error:
            raise self._failed(trainer, path, error) from error
        self.stood += time.monotonic() - self.last

    def wait(self, trainer: L.Trainer, path: Path) -> None:
        """Wait until the checkpoint that is being written stands in its place; all processes do.

        Raises:
            ValueError: if it cannot be written; the checkpoint before it is untouched.
        """
        begun = time.monotonic()
        try:
            written = self.writer.wait()
        except FAILURES as error:
            raise self._failed(trainer, path, error) from error
        trainer.strategy.barrier()
        now = time.monotonic()
        self.stood += now - begun
        if written and trainer.is_global_zero and not self.told:
            self.told = True
            share = self.stood / (now - self.begun)
            takes = f"{self.writer.size / 2**20:,.1f} MiB and {self.writer.seconds:.1f} s beside training"
            waits = f"which waits for a copy alone: {self.stood:.1f} s, {share:.1%} of its time so far"
            console.print(f"{path.parent.name}: a checkpoint takes {takes}, {waits}", soft_wrap=True)

    def _failed(self, trainer: L.Trainer, path: Path, error: BaseException) -> ValueError:
        if trainer.is_global_zero:
            remove(_draft(path))
        before = f"{path} of an earlier step is whole" if path.exists() else "no other exists"
        lost = f"the checkpoint of step {self.step} cannot be written"
        return ValueError(f"{lost}: {_reason(error)}; {before}")


def _draft(path: Path) -> Path:
    """One name for all processes."""
    return path.with_name(f".{path.name}{DRAFT}")


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


def _agreed(received: int, due: bool, stage: Stage) -> tuple[int, bool]:
    """The signal that any process has received, and whether a checkpoint is due for any, so that all
    do the same after the same step. Of several processes the trainer waits for the device in each
    step anyway, where it tells the others of its own signals."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return received, due
    seen = torch.tensor([received, due], dtype=torch.int32, device=stage.device)
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    signal, any_due = seen.tolist()
    return signal, bool(any_due)


def _reason(error: BaseException) -> str:
    """What went wrong, in the first process in which something did."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    number = errno_of(first)
    return str(first) if number is None else os.strerror(number)
