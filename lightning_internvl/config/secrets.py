"""Secrets of a run's settings, which its folder does not keep: what must be given again to go on.

Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_internvl.config.consent import hosts_of
from lightning_internvl.config.given import Given
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.messages import HIDDEN, ConfigError, first_of, hidden

RESUME = "resume="
_given: dict[str, Any] = {}  # by setting, beside `resume=` of this command line


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of settings with their dotted paths; those of a list have that of the list."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, path)
    else:
        yield path, node


def lacking(settings: Any) -> dict[str, str]:
    """What is hidden in the settings of a run, by setting."""
    return {path: value for path, value in leaves(settings) if isinstance(value, str) and HIDDEN in value}


def take_secrets(words: Sequence[str], parsed: Callable[[Iterable[str]], list[Given]]) -> list[str]:
    """The words of a command line without those that give a resumed run the secrets that it lacks,
    which are kept for `with_secrets`: the composition knows no settings of that run.

    Args:
        parsed: makes settings of words.
    """
    _given.clear()
    run = next((Path(word.removeprefix(RESUME).strip("'\"")) for word in words if word.startswith(RESUME)), None)
    file = run and run / RUN_CONFIG
    text = file.read_text(encoding="utf-8", errors="replace") if file and file.is_file() else ""
    if HIDDEN not in text:
        return list(words)
    asked = lacking(yaml.safe_load(text))
    ours = [word for word in words if word.partition("=")[0].lstrip("+") in asked]
    _given.update({".".join(one.path): one.value for one in parsed(ours)})
    return [word for word in words if word not in ours]


def given_hosts() -> list[str]:
    """The places that the user names by giving their secrets."""
    return [host for _, value in leaves(_given) for host in hosts_of(value)]


def with_secrets(settings: dict[str, Any], place: str, known: Any = None) -> dict[str, Any]:
    """The settings of a run with its secrets.

    Args:
        place: of the run, for the message.
        known: settings that have them; None: those that were given beside `resume=`.

    Raises:
        ConfigError: naming what must be given again.
    """
    given = list(leaves(_given if known is None else known))
    whole = dict(given)
    addresses = {form: value for _, value in given if isinstance(value, str) for form in (hidden(value), _bare(value))}

    def filled(node: Any, path: str = "") -> Any:
        if isinstance(node, dict):
            return {key: filled(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
        if isinstance(node, list):
            return [filled(value, path) for value in node]
        if not isinstance(node, str) or HIDDEN not in node:
            return node
        if node == HIDDEN:
            return whole.get(path, node)
        return addresses.get(node) or addresses.get(_bare(node)) or node

    found: dict[str, Any] = filled(settings)
    if missing := lacking(found):
        path, value = next(iter(missing.items()))
        others = {other for other, text in missing.items() if text != value or text == HIDDEN} - {path}
        more = f" (and {first_of(sorted(others))})" if others else ""
        secret = f"with the secret in the place of {HIDDEN}"
        raise ConfigError(
            [f"{place}: {path}{more} had a secret, which no run keeps; give it again: '{path}=\"{value}\"' {secret}"]
        )
    return found


def _bare(address: str) -> str:
    """An address without what may open it or ends with a date: user, password and query."""
    scheme, sign, rest = hidden(address).partition("://")
    return f"{scheme}{sign}{rest.partition('?')[0].rpartition('@')[2]}" if sign else address
