"""Which part of a run or a folder talks, and which one looks for pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_internvl.chat.session import CaptionSession, Session
from lightning_internvl.chat.settings import ChatSettings
from lightning_internvl.checkpoints.weight_source import handoffs_of
from lightning_internvl.choices import Config
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.inference.device import Place, place_for
from lightning_internvl.inference.load_official import open_model
from lightning_internvl.inference.load_run import LoadedRun, open_run, run_of, settings_of
from lightning_internvl.inference.picture_search import Gallery, Retriever
from lightning_internvl.messages import ConfigError
from lightning_internvl.model.compose import Build

SCENES = "HeldOutScenes"


class Loaded(NamedTuple):
    """What there is to talk to.

    Attributes:
        name: what answers, for people.
        session: begins a conversation; None where nothing talks.
        retriever: None where nothing compares pictures and texts.
        scenes: the settings of the built-in scenes on which it was trained, or None.
    """

    name: str
    session: Callable[[], Session] | None
    retriever: Retriever | None
    scenes: Config | None = None


def gallery_of(loaded: Loaded, folder: str | Path | None) -> Gallery | None:
    """The pictures of a folder, to look for; None without one.

    Raises:
        ConfigError: if there is nothing to do without a folder, or nothing that compares with one.
    """
    if folder is None:
        if loaded.session is None:
            nothing = f"{loaded.name} has no decoder to talk to; it looks for pictures"
            raise ConfigError([f"{nothing}: give gallery=FOLDER"])
        return None
    if loaded.retriever is None:
        nothing = f"{loaded.name} does not compare pictures and texts"
        raise ConfigError([f"{nothing}; leave gallery={folder} out"])
    return Gallery(folder, loaded.retriever)


def load(settings: ChatSettings, build: Build) -> Loaded:
    """What `run` or `model` of the settings names.

    Raises:
        ValueError: for what cannot be opened, or neither talks nor compares.
    """
    if settings.run is None:
        return load_model(settings)
    return load_run(Path(settings.run), build, partial(place_for, settings))


def load_model(settings: ChatSettings) -> Loaded:
    """A folder in an official layout, an exported hand-off, or a hub id."""
    place = settings.model
    assert place is not None  # a run or a model is given, as the checks have seen
    if (Path(place) / RUN_CONFIG).is_file():
        raise ValueError(f"model={place} is a run of this project; give run={place}")
    put = place_for(settings)
    found = open_model(place, **settings.reading, dtype=put.dtype)
    model, name = put.put(found.view.model), f"{Path(place).name} ({found.layout})"
    if found.view.chats is None:
        return Loaded(name, None, Retriever(model, found.view.pairs))
    return Loaded(name, lambda: Session(model, found.view.chats), None)


def load_run(place: Path, build: Build, where: Callable[[Any], Place]) -> Loaded:
    """The last stage of a run that answers (else writes captions), and the last that compares.

    Args:
        where: gives the place of a model that was trained in a precision.
    """
    stages = {folder: settings_of(folder) for folder in handoffs_of(place)}
    answers = [folder for folder, stage in stages.items() if stage.parts.decoder and not stage.embeds]
    captions = [folder for folder, stage in stages.items() if stage.samples.writer == "middleware"]
    readers = {folder: stage for folder, stage in stages.items() if stage.reads == "pairs"}
    compares = [folder for folder, stage in readers.items() if stage.embeds or not stage.parts.decoder]
    wanted = {*(answers or captions)[-1:], *compares[-1:]}
    if not wanted:
        nothing = "no finished stage answers, writes captions or compares"
        raise ValueError(f"{place}: {nothing}; stages: {', '.join(_names(stages))}")
    runs = {folder: open_run(folder, build) for folder in wanted}
    places = {folder: where(stages[folder].trainer.precision) for folder in wanted}
    for folder, one in runs.items():
        places[folder].put(one.view.model)
    run, talker = run_of(next(iter(stages))), (answers or captions)[-1:]
    name = f"{run.name}, stage {(talker or compares)[-1].name}"
    held_out = stages[[*stages][-1]].data.held_out or {}
    scenes = held_out if str(held_out.get("_target_")).endswith(SCENES) else None
    session = None
    if answers:
        session = _answer_session(runs[answers[-1]], places[answers[-1]])
    elif captions:
        session = _caption_session(runs[captions[-1]], places[captions[-1]])
    retriever = _retriever(runs[compares[-1]], places[compares[-1]]) if compares else None
    return Loaded(name, session, retriever, scenes)


def _answer_session(found: LoadedRun, place: Place) -> Callable[[], Session]:
    return lambda: Session(found.view.model, found.view.chats, precision=place.precision)


def _caption_session(found: LoadedRun, place: Place) -> Callable[[], Session]:
    return lambda: CaptionSession(found.view.model, found.view.pairs, precision=place.precision)


def _retriever(found: LoadedRun, place: Place) -> Retriever:
    return Retriever(found.view.model, found.view.pairs, found.settings.samples.mode, precision=place.precision)


def _names(folders: Mapping[Path, Any]) -> list[str]:
    return [folder.name for folder in folders]
