"""Writes the weights of a finished stage for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from callbacks.checkpoint import check_finished
from lightning_internvl.checkpoints import handoff
from lightning_internvl.stages import Stage


class HandOff(L.Callback):
    """Writes `handoff/<stage>/` when the stage has ended; the folder's existence marks the stage as finished.

    Args:
        tokenizers: of the parts that read text (completed); those that were read elsewhere are kept with the weights.
    """

    def __init__(self, tokenizers: Mapping[str, Any] | None = None) -> None:
        self.tokenizers = tokenizers

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Raises RunStopped if the stage has not done its last step."""
        check_finished(trainer, pl_module)
        if not trainer.is_global_zero:
            if pl_module.is_sharded:
                handoff.gather_for_save(pl_module.model, pl_module.base)
        else:
            step = trainer.global_step
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
