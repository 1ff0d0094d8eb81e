"""The progress bar: step, loss, speed, time left. Without a terminal: a line now and then."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_internvl.console import console
from lightning_internvl.stages import Stage


class Progress(L.Callback):
    """A rich bar on a terminal, else one line every `seconds` seconds.

    Args:
        every_n_steps: how often the loss is read; reading it makes the program wait for the device.
    """

    def __init__(self, *, every_n_steps: int = 10, seconds: float = 15.0) -> None:
        self.every_n_steps, self.seconds = every_n_steps, seconds
        self.bar: Bar | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self.printed = self.begun = time.monotonic()
        if not trainer.is_global_zero or not console.is_terminal:
            return
        self.bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        self.bar.start()
        done, last = trainer.global_step, pl_module.max_steps
        self.task = self.bar.add_task(pl_module.name, total=last, completed=done, note="")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        last = pl_module.max_steps
        if not trainer.is_global_zero or (step % self.every_n_steps and step != last):
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        note = "  ".join(f"{k.removeprefix('train/')} {v:.3f}" for k, v in found.items())
        ledger = getattr(getattr(trainer, "datamodule", None), "ledger", None)
        note += f"  {ledger.note()}" if ledger and ledger.kinds else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
        elif time.monotonic() - self.printed >= self.seconds or step == last:
            self.printed = time.monotonic()
            rate = (step - pl_module.start_step) / (self.printed - self.begun)
            console.print(f"{pl_module.name} {step}/{last}  {note}  {rate:.1f} steps/s")

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Stage, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
