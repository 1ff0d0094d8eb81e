"""Chat formats, a file for each family, whose `TEMPLATES` are known by their names."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from lightning_internvl.data.templates.base import IMAGE, VIDEO, ChatTemplate, Message, Segment, message_of

__all__ = [
    "IMAGE", "VIDEO", "ChatTemplate", "Message", "Segment", "load_template", "message_of", "template_names",
]  # fmt: skip


@functools.cache
def _templates() -> dict[str, ChatTemplate]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]
    families = [importlib.import_module(f"{__name__}.{name}").TEMPLATES for name in names]
    return {template.name: template for family in families for template in family}


def template_names() -> list[str]:
    """Names of all chat formats."""
    return sorted(_templates())


def load_template(name: str, system: str | None = None) -> ChatTemplate:
    """The chat format of that name, with `system` for its system message ("": none).

    Raises ValueError with the valid names for an unknown one.
    """
    if name not in _templates():
        raise ValueError(f"unknown chat template {name!r}; choose from {template_names()}")
    template = _templates()[name]
    return template if system is None else template.with_system(system)
