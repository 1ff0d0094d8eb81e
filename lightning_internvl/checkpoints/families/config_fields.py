"""Checks of single fields of a `config.json`."""

from __future__ import annotations

from lightning_internvl.checkpoints.name_rules import Config


def check_only(config: Config, only: Config, section: str) -> None:
    """Refuse values of fields of which we know one value.

    Raises:
        ValueError: naming the field, its value and the one that is known.
    """
    for field, known in only.items():
        if (value := config.get(field, known)) != known:
            raise ValueError(f"{section}.{field}={value!r} is not supported; it must be {known!r}")


def square_side(vision: Config, field: str) -> int:
    """The side of a square that a `vision_config` gives as one number or two."""
    sides = vision[field] if isinstance(vision[field], list | tuple) else [vision[field]]
    if len(set(sides)) != 1:
        raise ValueError(f"vision_config.{field}={sides} is not supported; it must be square")
    return sides[0]
