"""Writes the weights of a finished stage for the next one."""

from __future__ import annotations

import lightning as L

from callbacks.checkpoint import check_finished
from lightning_internvl.checkpoints import handoff
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext


class HandOff(L.Callback):
    """Writes `handoff/<stage>/` when the stage has ended; the folder marks it as finished."""

    def setup_stage(self, context: StageContext) -> None:
        """Tokenizers that were read elsewhere are kept with the weights."""
        self.tokenizers = context.tokenizers

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Raises RunStopped if the stage has not done its last step."""
        check_finished(trainer, pl_module)
        if not trainer.is_global_zero:
            if pl_module.is_sharded:
                handoff.gather_for_save(pl_module.model, pl_module.base)
        else:
            step = trainer.global_step if pl_module.weights_step is None else pl_module.weights_step
            handoff.save(
                pl_module.model,
                pl_module.handoff,
                stage=pl_module.name,
                step=step,
                config=pl_module.parts,
                plan=pl_module.plan,
                tokenizers=self.tokenizers,
                base=pl_module.base,
            )
        trainer.strategy.barrier()
