"""What a batch system gives a run: how its processes find each other, and its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from lightning_internvl.launch import under_srun


class StageClock(Timer):
    """Lightning's time limit, but that a run that goes on has all of its time again: the limit is
    that of a process."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What an earlier process has used is not counted."""


def stage_clock(limit: Any) -> list[Timer]:
    """The callback for `trainer.max_time`; none without it.

    Raises:
        ValueError: for a time that is none.
    """
    if limit is None:
        return []
    try:
        return [StageClock(limit)]
    except Exception as error:  # of several kinds, by what it was given
        raise ValueError(
            f"trainer.max_time={limit!r} is no time ({error}); write DAYS:HOURS:MINUTES:SECONDS, "
            "as '00:03:30:00', or {hours: 3, minutes: 30}"
        ) from error


def trainer_plugins(given: Any, build: Callable[..., Any]) -> list[Any]:
    """The plugins of a configuration, one or a list, and rendezvous under SLURM.

    Left to itself Lightning takes SLURM for granted wherever a job has tasks, also without srun; it
    then saves into the folder in which the command was started when SLURM sends its signal, has the
    job queued again, and starts the stages of any run in that folder from such a file.

    Raises:
        ValueError: for variables of SLURM that do not fit.
    """
    given = given or []
    given = given if isinstance(given, list) else [given]
    plugins = [build(one) if isinstance(one, Mapping) else one for one in given]
    named = any(isinstance(one, ClusterEnvironment) for one in plugins)
    if named or TorchElasticEnvironment.detect():
        return plugins
    if not SLURMEnvironment.detect():
        return plugins
    try:
        return [*plugins, SLURMEnvironment(auto_requeue=False) if under_srun() else LightningEnvironment()]
    except RuntimeError as error:
        raise ValueError(str(error)) from error
