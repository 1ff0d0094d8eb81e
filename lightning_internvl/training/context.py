"""What a callback can know of the stage that it accompanies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.inference.collators import View
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.model.compose import Build
from lightning_internvl.training.time_left import TimeLeft


@dataclass(frozen=True)
class StageContext:
    """Handed once to `setup_stage(context)` of every callback that has this method, before the
    trainer is built.

    Attributes:
        settings: of the stage, complete.
        view: how the stage sees data: its collators.
        predictor: the model with its collators and held-out data; None where there is no such data.
        tasks: what is measured, by name (see `lightning_internvl.evaluation.tasks`).
        tokenizers: of the parts that read text.
        build: makes an object from a configuration with `_target_`.
        time_left: of the run that the stage belongs to; None where it stands alone.
    """

    settings: StageSettings
    view: View
    predictor: Predictor | None
    tasks: Mapping[str, Callable[[Predictor], dict[str, float]]]
    tokenizers: Mapping[str, Any]
    build: Build
    time_left: TimeLeft | None = None
