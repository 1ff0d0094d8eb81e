"""What `chat.py` does: one answer, a conversation in the terminal, a page, or an API."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_internvl.chat.loading import Loaded, gallery_of, load
from lightning_internvl.chat.session import Sampling
from lightning_internvl.chat.settings import ChatSettings, images_of
from lightning_internvl.chat.terminal import Terminal, as_lines
from lightning_internvl.model.compose import Build


def run_chat(given: Mapping[str, Any], build: Build) -> None:
    """Do what the settings ask for.

    Raises:
        ValueError: for what cannot be opened or asked.
    """
    settings = ChatSettings.of(given)
    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = Sampling(**{name: getattr(settings, name) for name in names})
    loaded = load(settings, build)
    if settings.ui == "web":
        from lightning_internvl.chat.web import serve

        serve(loaded, settings, sampling)
        return
    if settings.ui == "api":
        from lightning_internvl.chat.api import serve_api

        serve_api(loaded, settings, sampling)
        return
    gallery = gallery_of(loaded, settings.gallery)
    if settings.question is None:
        Terminal(loaded, sampling, gallery, settings.found).run()
    elif gallery is not None:
        print(as_lines(gallery.search([settings.question], settings.found)[0]))
    else:
        print(one_answer(loaded, settings, sampling))


def one_answer(loaded: Loaded, settings: ChatSettings, sampling: Sampling) -> str:
    """The answer to `question` about the pictures of `image`."""
    assert loaded.session is not None  # or there would be a gallery
    assert settings.question is not None
    session = loaded.session()
    for path in images_of(settings.image):
        session.show(path)
    return list(session.ask(settings.question, sampling))[-1]
