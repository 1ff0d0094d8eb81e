"""What there is to measure: the finished stages of a run, or a folder in an official layout, each
opened when a task needs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lightning_internvl.checkpoints.weight_source import fingerprint, handoffs_of
from lightning_internvl.choices import Config
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.evaluation.settings import EvaluationSettings
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.inference.collators import View
from lightning_internvl.inference.device import Place, place_for
from lightning_internvl.inference.load_official import open_model
from lightning_internvl.inference.load_run import open_run, settings_of
from lightning_internvl.inference.predictor import Predictor, with_full_context
from lightning_internvl.model.compose import Build

NEEDS = {
    "chats": "a decoder that answers",
    "captions": "a decoder, or a middleware that writes captions",
    "pairs": "a middleware that compares pictures and texts, or the stage embed",
    "labels": "a probe that names pictures",
    "encoder": "an encoder",
}


class ModelUnderTest(NamedTuple):
    """A model that can be measured.

    Attributes:
        name: the stage that trained it; "" for a folder in an official layout.
        place: where its weights are.
        offers: what tasks may need of it, among `NEEDS`.
        open: loads it.
        tasks: settings of the tasks that training measured it by; None where nobody says.
        weights: what tells its weights from others.
        dtype: in which types it runs.
    """

    name: str
    place: str
    offers: frozenset[str]
    open: Callable[[], Predictor]
    tasks: Config | None
    weights: str
    dtype: str


def models_under_test(settings: EvaluationSettings, build: Build) -> list[ModelUnderTest]:
    """All that `run` or `model` of the settings names, in the order of training.

    Raises:
        ValueError: for what cannot be opened.
    """
    put = place_for(settings)  # a device that is not here is told before anything is read
    if settings.run is not None:
        return [_model_of_stage(folder, settings, build) for folder in handoffs_of(Path(settings.run))]
    place = settings.model
    assert place is not None  # a run or a model is given, as the checks have seen
    if (Path(place) / RUN_CONFIG).is_file():
        raise ValueError(f"model={place} is a run of this project; give run={place}")
    found = open_model(place, **settings.reading, dtype=put.dtype)
    offers = {"encoder"}
    if found.view.chats:
        offers |= {"chats", "captions"}
    if found.view.pairs:
        offers |= {"pairs"}
    predictor = _predictor(found.view, None, put, settings.batch_size, build)
    return [ModelUnderTest("", str(place), frozenset(offers), lambda: predictor, None, fingerprint(place), put.name)]


def model_for(task: str, needs: str | None, models: list[ModelUnderTest]) -> ModelUnderTest:
    """The last model that can do a task.

    Raises:
        ValueError: if none can, or the task does not say what it needs.
    """
    if needs not in NEEDS:
        raise ValueError(f"task.{task}: the class has {needs=}; valid choices: {', '.join(NEEDS)}")
    able = [model for model in models if needs in model.offers]
    if not able:
        seen = ", ".join(f"{s.name or s.place} ({', '.join(sorted(s.offers))})" for s in models)
        raise ValueError(f"task.{task} needs {NEEDS[needs]}; there is {seen}")
    return able[-1]


def _model_of_stage(folder: Path, settings: EvaluationSettings, build: Build) -> ModelUnderTest:
    stage = settings_of(folder)
    place = place_for(settings, stage.trainer.precision)
    offers = {"encoder"}
    if stage.embeds:
        offers |= {"pairs"}
    elif stage.parts.decoder:
        offers |= {"chats", "captions"}
    elif stage.reads in ("pairs", "labels"):
        offers |= {stage.reads}
    if stage.samples.writer == "middleware":
        offers |= {"captions"}

    def load_stage() -> Predictor:
        found = open_run(folder, build)
        return _predictor(found.view, found.settings.data.measured_on, place, settings.batch_size, build)

    known = stage.evaluation, fingerprint(folder), place.name
    return ModelUnderTest(folder.name, str(folder), frozenset(offers), load_stage, *known)


def _predictor(view: View, held_out: Config | None, place: Place, batch_size: int, build: Build) -> Predictor:
    """A model where it is to run, with its own held-out scenes or, of one that has none, scenes as
    large as it sees pictures."""
    model = place.put(view.model).eval()
    chats = with_full_context(view.chats, model) if view.chats else None
    reader = next(one for one in (view.chats, view.pairs, view.labels) if one is not None)
    scenes = build(held_out) if held_out else HeldOutScenes(seed=0, image_size=reader.processor.image_size)
    readers: dict[str, Any] = {"pairs": view.pairs, "chats": chats, "labels": view.labels}
    predictor = Predictor(model, scenes, batch_size=batch_size, **readers)
    predictor.precision = place.precision
    return predictor
