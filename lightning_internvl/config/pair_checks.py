"""Batches in which a loss has nothing to compare a pair with.

Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_internvl.config.fit import name_of
from lightning_internvl.config.hardware import readers
from lightning_internvl.config.signatures import attributes_of
from lightning_internvl.config.stage_settings import StageSettings

NO_HELP = "trainer.accumulate_grad_batches does not help, it compares the pairs of one micro-batch"


def pair_faults(config: Mapping[str, Any], settings: StageSettings) -> Iterator[str]:
    """A contrast over one pair, whose loss never moves, and wrong partners drawn from one pair.

    An objective says with `compares` that it contrasts the pairs of all devices, and with
    `draws_wrong_partners` that each pair needs another one of its device.
    """
    if settings.batch_size != 1:
        return
    devices = readers(config, settings.name)
    for name, objective in settings.parts.objectives.items():
        told, kind = attributes_of(str(objective["_target_"])), name_of(objective)
        if "compares" in told and devices == 1:
            fault = f"{kind} ({name}) has nothing to compare a single pair with, its loss would always be the same"
        elif told.get("draws_wrong_partners"):
            fault = f"{kind} ({name}) shows a wrong partner from the batch of the same device, where there is none"
        else:
            continue
        if config["resume"]:
            yield f"batch_size=1 of each device: {fault}; resume on fewer: at most half as many, trainer.devices=N"
        else:
            yield f"batch_size=1: {fault}; give stages.{settings.name}.batch_size=2 or more ({NO_HELP})"
        return
