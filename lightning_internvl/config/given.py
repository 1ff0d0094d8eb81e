"""Settings as the words of a command line give them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning_internvl.messages import ConfigError

Path = tuple[str, ...]
VALUE, GROUP, DELETED = "value", "group", "deleted"  # how a setting is given: X.Y=1, X=FILE, ~X.Y
# groups with one place in the configuration, which a command line may leave out
PLACES = {"processor": "processor@data.processor"}


class Given(NamedTuple):
    """One setting as a user gives it.

    Attributes:
        path: its place in the configuration.
        value: what is given: a value, or the name of a file for a group.
        text: the words of the command line, for messages.
    """

    path: Path
    value: Any
    kind: str
    text: str


def with_place(word: str) -> str:
    """A word of the command line with the place of its group: `processor=tiles` is
    `processor@data.processor=tiles`."""
    name, sign, value = word.partition("=")
    return f"{PLACES[name]}={value}" if sign and name in PLACES else word


def check_given_once(given: Iterable[Given]) -> None:
    """Refuse a setting that is given several times, as when a shell expands braces that are not
    quoted.

    Raises:
        ConfigError: naming each such setting with all its values.
    """
    words: dict[Path, list[str]] = {}
    for one in given:
        if one.kind != DELETED:  # `debug=fast ~debug` takes back what stands before it
            words.setdefault(one.path, []).append(one.text)
    faults = []
    for path, texts in words.items():
        if len(texts) > 1:
            shown = " ".join(texts[:4]) + (" ..." if len(texts) > 4 else "")
            setting = ".".join(path)
            faults.append(
                f"{setting} is given {len(texts)} times ({shown}), and only one can hold; give it once. A shell makes several "
                f"words of braces without quotes; write '{setting}=\"...{{000..003}}...\"'"
            )
    if faults:
        raise ConfigError(faults)
