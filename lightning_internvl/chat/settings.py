"""Faults of the settings in conf/chat.yaml, found before PyTorch is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_internvl.config.model_source import ModelSource, running_faults, source_faults
from lightning_internvl.distributed.signals import NAMES
from lightning_internvl.messages import ConfigError, did_you_mean, number_faults

# that end it, after which uploads are gone; Ctrl-C stops an answer in the terminal
SIGNALS = [number for number, told in NAMES.items() if told in ("SIGTERM", "SIGHUP")]
UIS = ("terminal", "web", "api")
WEB = "requirements-chat.txt"
PASSWORD = "INTERNVL_CHAT_PASSWORD"  # the variable that a password is read from
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HIDDEN = "***"  # what stands on a command line, once it has been read, in place of a password


@dataclass(frozen=True)
class Limits:
    """What visitors of the page and the API may take; fields of conf/chat.yaml, which explains them."""

    max_upload_mb: float
    max_pictures: int
    max_messages: int
    max_characters: int
    max_new_tokens: int
    max_parallel: int
    max_waiting: int
    max_memory_mb: float
    max_uploads_mb: float
    max_share: float

    @property
    def longest_answer(self) -> int:
        """Tokens that a visitor may ask for."""
        return max(1024, self.max_new_tokens)


@dataclass(frozen=True)
class ChatSettings(ModelSource, Limits):
    """The settings of conf/chat.yaml."""

    ui: str
    question: str | None
    image: str | list[str] | None
    temperature: float
    top_p: float
    beams: int
    seed: int
    gallery: str | None
    found: int
    host: str
    port: int
    trust: list[str]
    password: str | None = dataclasses.field(repr=False)

    @property
    def is_local(self) -> bool:
        """Whether this machine alone reaches the server."""
        return self.host in LOOPBACK


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check what can be checked without loading the model.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is valid.
    """
    if faults := [*source_faults(settings, "nothing to talk to"), *_use_faults(settings), *_number_faults(settings)]:
        raise ConfigError(faults)


def hide_password(words: Sequence[str]) -> list[str]:
    """A command line whose password stands in the environment instead, so that nothing that shows
    settings (`--cfg`, messages) shows it."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name.lstrip("+") == "password" and equals and value not in ("null", HIDDEN):
            os.environ[PASSWORD] = re.sub(r"""^(["'])(.*)\1$""", r"\2", value)
            word = f"{name}={HIDDEN}"
        found.append(word)
    return found


def with_password(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the password of the environment, where they say no other one."""
    given = settings["password"]
    return {**settings, "password": os.environ.get(PASSWORD) if given in (None, HIDDEN) else given}


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
    if (ui := settings["ui"]) in ("web", "api"):
        if settings["question"] is not None:
            yield f"question= is for one answer in the terminal; leave it out with ui={ui}"
        if importlib.util.find_spec("gradio") is None:
            yield f"ui={ui} needs Gradio, which is not installed: pip install -r {WEB}"
    if ui == "api" and settings["gallery"] is not None:
        yield "gallery= is searched on the page and in the terminal; with ui=api compare what /v1/embeddings gives"
    if ui == "terminal" and settings["password"] is not None:
        yield "password= is asked for on the page and by the API; leave it out, or give ui=web or ui=api"
    if (word := with_password(settings)["password"]) is not None and (not isinstance(word, str) or not word.strip()):
        yield f"the password (password=, or the variable {PASSWORD}) must be a text that is not empty"


def _number_faults(settings: Mapping[str, Any]) -> Iterable[str]:
    whole = {"max_new_tokens": 1, "beams": 1, "seed": 0, "found": 1}
    whole |= {"max_pictures": 0, "max_messages": 1, "max_characters": 1, "max_parallel": 1, "max_waiting": 0}
    for name, least in whole.items():
        yield from number_faults(name, settings[name], least=least, whole=True)
    yield from number_faults("port", settings["port"], least=0, most=65535, whole=True)
    for name in ("temperature", "top_p"):
        yield from number_faults(name, settings[name])
    for name in ("max_upload_mb", "max_memory_mb", "max_uploads_mb"):
        yield from number_faults(name, settings[name], above=0, most=1_000_000)
    yield from number_faults("max_share", settings["max_share"], above=0, most=1)
