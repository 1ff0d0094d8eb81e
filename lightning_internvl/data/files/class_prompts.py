"""What is said about a class so that a picture can be named without training (CLIP, Radford et al.
2021, section 3.1.4).

A prompt has "{}" where the name stands; a class is the mean of its prompts
(`evaluation.tasks.ZeroShot`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_internvl.files import parsed_yaml

SETS_FILE = Path(__file__).with_suffix(".yaml")


@functools.cache
def prompt_sets() -> Mapping[str, Sequence[str]]:
    """The sets that come with this project, by name."""
    return parsed_yaml(SETS_FILE.read_text(encoding="utf-8"))


def prompts(names: Sequence[str], kind: str = "imagenet") -> list[list[str]]:
    """All prompts of every class.

    Args:
        names: of the classes; underscores, as in names of folders, are read as spaces.
        kind: a name in `prompt_sets`, or a YAML file with a list of prompts, or with such a list
            for every class.

    Raises:
        ValueError: for an unknown kind, and for a file that is none of both; it names the class or
            the prompt.
    """
    patterns = read_prompts(kind)
    if isinstance(patterns, Mapping):
        if missing := [name for name in names if name not in patterns]:
            lacking = f"{len(missing)} of {len(names)} lack them"
            raise ValueError(f"{kind}: there are no prompts for the class {missing[0]!r} ({lacking})")
        return [[_fill_in(pattern, name) for pattern in patterns[name]] for name in names]
    return [[_fill_in(pattern, name) for pattern in patterns] for name in names]


def read_prompts(kind: str) -> Sequence[str] | Mapping[str, Sequence[str]]:
    """Prompts with "{}" for a name, or every class's own; raises ValueError as `prompts`."""
    if not kind.endswith((".yaml", ".yml")):
        if kind not in prompt_sets():
            choices = ", ".join(prompt_sets())
            choices = f"{choices}, or a YAML file of your own"
            raise ValueError(f"prompts {kind!r} are not known; valid choices: {choices}")
        return prompt_sets()[kind]
    if not Path(kind).is_file():
        raise ValueError(f"{kind}: there is no such file of prompts")
    try:
        found = parsed_yaml(Path(kind).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{kind} is no YAML: {error}") from error
    if isinstance(found, Mapping) and found and all(_texts(own) for own in found.values()):
        return {str(name): own for name, own in found.items()}
    if not _texts(found):
        raise ValueError(f"{kind} must hold a list of prompts, or for every class such a list")
    if bare := [pattern for pattern in found if "{}" not in pattern and "{c}" not in pattern]:
        raise ValueError(f"{kind}: the prompt {bare[0]!r} has no {{}} where the name of the class stands")
    return found


def _texts(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(x, str) and x for x in found)


def _fill_in(pattern: str, name: str) -> str:
    return pattern.replace("{c}", "{}").replace("{}", name.replace("_", " "))
