"""Chat formats, one module each: adding a format is adding a file that defines `TEMPLATE`."""

from __future__ import annotations

import importlib
import pkgutil

from lightning_internvl.data.templates.base import IMAGE, VIDEO, ChatTemplate, Message, Segment

__all__ = ["IMAGE", "VIDEO", "ChatTemplate", "Message", "Segment", "load_template", "template_names"]


def template_names() -> list[str]:
    """Names of all chat formats."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def load_template(name: str, system: str | None = None) -> ChatTemplate:
    """The chat format of that name, with another system message when `system` is given ("" leaves it out).

    Raises ValueError with the valid names for an unknown one.
    """
    if name not in template_names():
        raise ValueError(f"unknown chat template {name!r}; choose from {template_names()}")
    template: ChatTemplate = importlib.import_module(f"{__name__}.{name}").TEMPLATE
    return template if system is None else template.with_system(system)
