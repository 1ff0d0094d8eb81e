"""Freezes and unfreezes parameters between stages and within one.

The state is a pure function of (stage, step), so it needs no state of its own: it is applied before
the optimizer is built and before a checkpoint is restored, at the start of training, and at every
step where the schedule changes.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from rich.table import Table

from lightning_internvl.console import console
from lightning_internvl.distributed.fsdp2 import gather_once
from lightning_internvl.files import read_json, write_json
from lightning_internvl.stages import Stage


class Freezing(L.Callback):
    """Applies the stage's `train:` rules, prints the table at each change and keeps it."""

    def setup(self, trainer: L.Trainer, pl_module: Stage, stage: str) -> None:
        pl_module.plan.apply(pl_module.model, pl_module.start_step)
        # it never sums gradients of weights that are frozen when it is set up
        if isinstance(trainer.strategy, DDPStrategy):
            for name, parameter in pl_module.model.named_parameters():
                parameter.requires_grad_(pl_module.plan.ever_trains(name))

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self._change(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Stage, batch: Any, batch_idx: int) -> None:
        first_of_step = batch_idx % trainer.accumulate_grad_batches == 0
        step = trainer.global_step
        if first_of_step and step != pl_module.start_step and step in pl_module.plan.changes():
            self._change(trainer, pl_module)

    def _change(self, trainer: L.Trainer, stage: Stage) -> None:
        step = trainer.global_step
        stage.plan.apply(stage.model, step)
        if stage.is_sharded and step > stage.start_step:
            gather_once(stage)
        if not trainer.is_global_zero:
            return
        rows = stage.plan.table(stage.model, step)
        console.print(freezing_table(stage.name, step, rows))
        path = stage.folder / "freezing.json"
        earlier = [entry for entry in read_json(path, []) if entry["step"] < step]
        if not earlier or earlier[-1]["rows"] != rows:  # a resumed run repeats the state it left
            write_json(path, [*earlier, {"step": step, "rows": rows}])


def freezing_table(stage: str, step: int, rows: list[dict[str, Any]]) -> Table:
    """Trained and frozen parameters by group, and why."""
    title = f"{stage}, step {step}: what trains"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("group")
    table.add_column("trained", justify="right", style="green")
    table.add_column("frozen", justify="right", style="cyan")
    table.add_column("why")
    for row in rows:
        table.add_row(
            row["group"],
            f"{row['trained']:,}" if row["trained"] else "",
            f"{row['frozen']:,}" if row["frozen"] else "",
            row["why"],
        )
    totals = [f"{sum(row[kind] for row in rows):,}" for kind in ("trained", "frozen")]
    table.add_row("all", *totals, "", style="bold")
    return table
