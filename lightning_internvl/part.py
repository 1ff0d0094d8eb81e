"""A part of a model: a module that remembers what it was made of, so that one that was loaded can be built again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Part(nn.Module):
    """Encoders, middlewares and decoders.

    Attributes:
        settings: the arguments of its constructor by name, those of a base class that they were handed on to among them.
    """

    settings: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of a part with the same architecture: `_target_` and settings in plain values. It is that of the part
        as it was made: a table of positions that was resized since has its first size."""
        own = {name: value.config if isinstance(value, Part) else value for name, value in self.settings.items()}
        own |= getattr(self, "without_source", {})
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **own}


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)
    others = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(init)
    def wrapped(self: Part, *args: Any, **kwargs: Any) -> None:
        if "settings" not in self.__dict__:  # the outermost class has been told everything
            given = dict(signature.bind(self, *args, **kwargs).arguments)
            given |= given.pop(others, {}) if others else {}
            self.__dict__["settings"] = {name: value for name, value in given.items() if name != "self"}
        init(self, *args, **kwargs)

    return wrapped
