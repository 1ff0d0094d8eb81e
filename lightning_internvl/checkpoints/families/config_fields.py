"""Checks of single fields of a `config.json`."""

from __future__ import annotations

from lightning_internvl.checkpoints.name_rules import Config

BLOCK = {
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}


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


def block_sizes(config: Config) -> Config:
    """What a config says of equal blocks, as arguments of our parts."""
    return {ours: config[theirs] for ours, theirs in BLOCK.items()}


def tower_sizes(vision: Config) -> Config:
    """What a `vision_config` says of a tower's pictures and blocks, as arguments of our towers."""
    sides = {name: square_side(vision, name) for name in ("image_size", "patch_size")}
    return sides | block_sizes(vision)
