"""What training measures, measured again: the tasks of a stage as one."""

from __future__ import annotations

from lightning_internvl.evaluation.tasks import Answering, Captioning, Metrics, Retrieval, ZeroShot
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.model.compose import Build, Config


class StageTasks:
    """The tasks of every finished stage. `of` gives those of one stage, or those that a model
    without stages can do."""

    def __init__(self, version: int = 1) -> None:
        self.version = version

    def __call__(self, predictor: Predictor) -> Metrics:
        tasks = [Answering(), Captioning(writer="decoder")] if predictor.chats else [ZeroShot(), Retrieval(mode="c", name="c")]
        return run_all(tasks, predictor)

    @staticmethod
    def of(tasks: Config, predictor: Predictor, build: Build) -> Metrics:
        """The numbers of a stage.

        Args:
            tasks: settings of its tasks by name.
        """
        return run_all([build(task) for task in tasks.values() if task], predictor)


def run_all(tasks: list, predictor: Predictor) -> Metrics:
    """The numbers of several tasks together."""
    found: Metrics = {}
    for task in tasks:
        found |= task(predictor)
    return found
