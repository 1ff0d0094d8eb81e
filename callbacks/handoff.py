"""Writes the weights of a finished stage for the next one."""

from __future__ import annotations

import lightning as L

from lightning_internvl.checkpoints import handoff
from lightning_internvl.stages import Stage


class HandOff(L.Callback):
    """Writes `handoff/<stage>/` when the stage has ended; the folder's existence marks the stage as finished."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        if trainer.is_global_zero:
            step = trainer.global_step
            handoff.save(
                pl_module.model, pl_module.handoff, stage=pl_module.name, step=step, config=pl_module.parts, plan=pl_module.plan
            )
        trainer.strategy.barrier()
