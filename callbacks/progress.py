"""The progress bar: stage, step, loss, speed, time left in the run. Without a terminal: a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import lightning as L
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress as RichBar, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lightning_internvl.console import console
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext
from lightning_internvl.training.time_left import Pace, TimeLeft


class Bar(RichBar):
    """A bar with a line of text below it, so that both fit on a terminal of 80 columns."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the text."""
        yield from super().get_renderables()
        yield Text(self.below, no_wrap=True, overflow="ellipsis")


class Progress(L.Callback):
    """A rich bar on a terminal, else one line every `seconds` seconds.

    Args:
        every_n_steps: how often the loss is read; reading it makes the program wait for the device.
    """

    def __init__(self, *, every_n_steps: int = 10, seconds: float = 15.0) -> None:
        self.every_n_steps, self.seconds = every_n_steps, seconds
        self.bar: Bar | None = None
        self.time_left: TimeLeft | None = None  # of a stage that belongs to no run there is none

    def setup_stage(self, context: StageContext) -> None:
        """Which stage of how many it is."""
        self.time_left = context.time_left

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self.printed, self.pace = time.monotonic(), Pace(trainer.global_step)
        self.title = pl_module.name
        if self.time_left is not None:
            self.title = f"{self.time_left.place(pl_module.name)} {pl_module.name}"
        if not trainer.is_global_zero or not console.is_terminal:
            return
        self.bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.bar.start()
        done, last = trainer.global_step, pl_module.max_steps
        self.task = self.bar.add_task(self.title, total=last, completed=done)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        last = pl_module.max_steps
        if not trainer.is_global_zero or (step % self.every_n_steps and step != last):
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        note = "  ".join(f"{k.removeprefix('train/')} {v:.3f}" for k, v in found.items())
        ledger = getattr(getattr(trainer, "datamodule", None), "ledger", None)
        note += f"  {ledger.note()}" if ledger and ledger.kinds else ""
        pace, due = self.pace.at(step), time.monotonic() - self.printed >= self.seconds or step == last
        if self.bar is None and not due:
            return
        left = self.time_left.told(pl_module.name, last - step, pace) if self.time_left is not None else ""
        if self.bar is not None:
            self.bar.below = "  ".join(filter(None, (left, note)))
            self.bar.update(self.task, completed=step)
        else:
            self.printed = time.monotonic()
            told = "  ".join(filter(None, (f"{self.title} {step}/{last}", note, f"{pace:.1f} steps/s", left)))
            console.print(told, soft_wrap=True, markup=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Stage, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
