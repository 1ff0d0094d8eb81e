"""Faults of the settings in conf/chat.yaml, found before PyTorch is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_internvl.config.model_source import ModelSource, running_faults, source_faults
from lightning_internvl.messages import ConfigError, did_you_mean, number_faults

UIS = ("terminal", "web")
WEB = "requirements-chat.txt"


@dataclass(frozen=True)
class ChatSettings(ModelSource):
    """The settings of conf/chat.yaml."""

    ui: str
    question: str | None
    image: str | list[str] | None
    temperature: float
    top_p: float
    max_new_tokens: int
    beams: int
    seed: int
    gallery: str | None
    found: int
    host: str
    port: int
    max_upload_mb: float


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check what can be checked without loading the model.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is valid.
    """
    if faults := [*source_faults(settings, "nothing to talk to"), *_use_faults(settings), *_number_faults(settings)]:
        raise ConfigError(faults)


def images_of(image: str | list[str] | None) -> list[str]:
    """The paths in `image`, one or several."""
    images = image if isinstance(image, list) else [image]
    return [str(path) for path in images if path is not None]


def _use_faults(settings: Mapping[str, Any]) -> Iterable[str]:
    if settings["ui"] not in UIS:
        yield f"ui={settings['ui']!r} is not known; {did_you_mean(settings['ui'], UIS)}"
    yield from running_faults(settings)
    if settings["image"] is not None and settings["question"] is None:
        yield 'image= needs question="..." with it; in a conversation, show a picture with /image PATH'
    for path in images_of(settings["image"]):
        if not Path(path).is_file():
            yield f"image={path} does not exist"
    if settings["image"] is not None and settings["gallery"] is not None:
        yield "image= and gallery= exclude each other: question= is about a picture, or looks for some; leave one out"
    if settings["gallery"] is not None and not Path(str(settings["gallery"])).is_dir():
        yield f"gallery={settings['gallery']} is no folder"
    if settings["ui"] == "web":
        if settings["question"] is not None:
            yield "question= is for one answer in the terminal; leave it out with ui=web"
        if importlib.util.find_spec("gradio") is None:
            yield f"ui=web needs Gradio, which is not installed: pip install -r {WEB}"


def _number_faults(settings: Mapping[str, Any]) -> Iterable[str]:
    whole = {"max_new_tokens": 1, "beams": 1, "seed": 0, "found": 1, "port": 0}
    for name, least in whole.items():
        yield from number_faults(name, settings[name], least=least, whole=True)
    for name in ("temperature", "top_p", "max_upload_mb"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{name}={value!r} must be a number"
    if isinstance(settings["port"], int) and settings["port"] > 65535:
        yield f"port={settings['port']} must be at most 65535"
    if isinstance(settings["max_upload_mb"], int | float) and settings["max_upload_mb"] <= 0:
        yield f"max_upload_mb={settings['max_upload_mb']} must be above 0"
