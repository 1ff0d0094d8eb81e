"""Measuring on the way: what is logged, which weights are kept, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from callbacks import Tracking, best_weights, checkpoint
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.files import read_json, write_json
from lightning_internvl.inference.predictor import Predictor


class Notebook:
    """A logger that remembers; its `experiment` takes pictures as TensorBoard's does."""

    def __init__(self) -> None:
        self.rows, self.pictures, self.texts = [], [], []
        self.experiment = SimpleNamespace(
            add_image=lambda tag, picture, step, dataformats: self.pictures.append((tag, picture.shape, step)),
            add_text=lambda tag, text, step: self.texts.append(text),
        )

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))


class ImageNotebook(Notebook):
    """A logger as W&B's."""

    def log_image(self, key: str, images: list[Any], caption: list[str], step: int) -> None:
        self.pictures.append((key, len(images), step))


class Task:
    """Scores what it is told, one value a call."""

    name = "score"

    def __init__(self, *values: float) -> None:
        self.values, self.scenes = list(values), []

    def __call__(self, bench: Predictor) -> dict[str, float]:
        assert not bench.model.training
        self.scenes.append(bench.held_out.scenes)
        bench.journal.show(np.zeros((8, 8, 3), np.uint8), question="what?", answer="pig", truth="cow", right=False)
        return {self.name: self.values.pop(0), "score_chance": 0.5}


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose weights were kept."""
    steps: list[int] = []

    def save(model: Any, place: Path, *, stage: str, step: int, **_: Any) -> None:
        place.mkdir(parents=True, exist_ok=True)
        steps.append(step)

    monkeypatch.setattr(best_weights.handoff, "save", save)
    return steps


def track(folder: Path, task: Task, steps: range, logger: Notebook | None = None, **options: Any) -> Tracking:
    """A stage that stands at these steps one after the other, until it ends."""
    model = torch.nn.Linear(1, 1)
    predictor = Predictor(model, HeldOutScenes(seed=0, image_size=16, scenes=40))
    callback = Tracking(**{"every_n_steps": 2, "samples": 10, **options})
    callback.setup_stage(SimpleNamespace(tasks={"task": task}, predictor=predictor, tokenizers={}))
    places = {"run_dir": folder, "folder": folder / "stages" / "first"}
    built = {"is_sharded": False, "max_steps": 100, "model": model, "parts": {}, "plan": None, "base": None}
    stage = SimpleNamespace(name="first", use=lambda function, *rest: function(*rest), **places, **built)
    for step in steps:
        trainer = SimpleNamespace(
            global_step=step,
            is_global_zero=True,
            accumulate_grad_batches=1,
            loggers=[logger] if logger else [],
            datamodule=None,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()),
            precision_plugin=Precision(),
        )
        if step == steps[0]:
            callback.on_train_start(trainer, stage)
        if step:
            callback.on_train_batch_end(trainer, stage, None, None, step - 1)
        if step == stage.max_steps:
            break
    assert model.training
    return callback


def test_metrics_and_pictures_are_logged(tmp_path: Path) -> None:
    task, logger, other = Task(0.1, 0.2, 0.3), Notebook(), ImageNotebook()
    track(tmp_path, task, range(5), logger)
    assert logger.rows == [(0, {"val/score": 0.1}), (1, {"val/score": 0.2}), (3, {"val/score": 0.3})]
    assert logger.pictures[-1] == ("val/wrong/0", (8, 8, 3), 3)
    assert logger.texts[-1] == "what? pig (true: cow)"
    assert task.scenes == [10, 10, 10]  # fewer than at the end
    assert read_json(tmp_path / "stages" / "first" / "tracked_chance.json") == {"score": 0.5}
    track(tmp_path, Task(0.1), range(1), other)
    assert other.pictures == [("val/wrong", 1, 0)]


@pytest.mark.parametrize(("lowest", "kept"), [(False, [0, 4]), (True, [0, 2, 6])])
def test_the_best_weights_are_kept(lowest: bool, kept: list[int], tmp_path: Path, saved: list[int]) -> None:
    track(tmp_path, Task(0.5, 0.2, 0.6, 0.1), range(7), best="score", lowest=lowest)
    assert saved == kept
    assert read_json(tmp_path / "stages" / "first" / "best.json") == {
        "metric": "score", "value": 0.1 if lowest else 0.6, "step": kept[-1],
    }  # fmt: skip
    track(tmp_path, Task(0.55), range(8, 9), best="score", lowest=lowest)  # the run goes on after a stop
    assert saved == kept
    (tmp_path / "best" / "first").rmdir()  # the stop came while weights were written
    track(tmp_path, Task(0.55), range(8, 9), best="score", lowest=lowest)
    assert saved == [*kept, 8]


def test_a_value_that_is_no_number_is_never_the_best(tmp_path: Path, saved: list[int]) -> None:
    nan = float("nan")
    track(tmp_path, Task(nan, 0.2, nan, 0.3), range(7), best="score")
    assert saved == [2, 6]
    write_json(tmp_path / "stages" / "first" / "best.json", {"metric": "score", "value": nan, "step": 6})  # of an older run
    track(tmp_path, Task(0.1), range(8, 9), best="score")
    assert saved == [2, 6, 8]


def test_a_stage_that_is_not_named_keeps_nothing(tmp_path: Path, saved: list[int]) -> None:
    track(tmp_path, Task(0.5), range(1), best={"second": "recall"})
    assert not saved


def test_a_loss_is_best_where_it_is_lowest(tmp_path: Path, saved: list[int]) -> None:
    task = Task(0.5, 0.2, 0.6, 0.1)
    task.name = "some_loss"
    track(tmp_path, task, range(7), best="some_loss")
    assert saved == [0, 2, 6]


def test_a_stage_ends_when_nothing_was_better_for_long(tmp_path: Path, saved: list[int]) -> None:
    values = (0.5, 0.6, 0.4, 0.7, 0.7, 0.6)
    callback = track(tmp_path, Task(*values), range(20), best="score", patience=2)
    assert saved == [0, 2, 6]
    assert callback.ended_early
    assert callback.weights.state == {"metric": "score", "value": 0.7, "step": 6, "waited": 2}
    trainer = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()), global_step=10)
    stage, again = SimpleNamespace(max_steps=100), Tracking(every_n_steps=2, best="score", patience=2)
    state = {"global_step": 10, "callbacks": {again.state_key: callback.state_dict()}}
    again.on_load_checkpoint(trainer, stage, state)  # stopped between its end and its hand-off
    again.load_state_dict(callback.state_dict())
    assert stage.max_steps == trainer.fit_loop.epoch_loop.max_steps == 10
    assert again.state_dict() == callback.state_dict()
    checkpoint.check_finished(trainer, stage)


def test_so_many_times_evenly_over_the_stage(tmp_path: Path) -> None:
    task, logger = Task(*(0.1,) * 6), Notebook()
    track(tmp_path, task, range(101), logger, every_n_steps=None, times=3)
    assert [step for step, _ in logger.rows] == [0, 32, 66, 99]


def test_faults(tmp_path: Path) -> None:
    callback = track(tmp_path, Task(0.5), range(1), every_n_steps=2)
    assert callback.weights.state == {}
    with pytest.raises(ValueError, match="stage first has no such metric; did you mean 'score'"):
        track(tmp_path, Task(0.5), range(1), best="scor")
    with pytest.raises(ValueError, match="needs every_n_steps=N"):
        Tracking(best="score")
    with pytest.raises(ValueError, match="samples=5 must be 10 or more"):
        Tracking(samples=5)
    with pytest.raises(ValueError, match="times=0 must be 1 or more"):
        Tracking(times=0)
    for options in ({"take_best": True}, {"patience": 3}):
        with pytest.raises(ValueError, match="take_best and patience need best=METRIC"):
            Tracking(every_n_steps=2, **options)
