"""What a user is told: faults of the configuration, the first of many names, the nearest valid word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def listed(items: Iterable[str], limit: int = 20) -> str:
    """At most `limit` items in one line, and how many there are."""
    items = list(items)
    more = f", ... ({len(items)} in all)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


class ConfigError(ValueError):
    """All faults that were found, one a line."""

    def __init__(self, faults: Iterable[str]) -> None:
        super().__init__("\n".join(faults))


def some(names: Iterable[Any], shown: int = 4) -> str:
    """The first of many names, as a message tells them."""
    names = list(map(str, names))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def suggestion(word: str, choices: Iterable[str]) -> str:
    """`did you mean ...? valid choices: ...`"""
    choices = list(choices)
    near = difflib.get_close_matches(str(word), choices, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid choices: {', '.join(choices)}"
