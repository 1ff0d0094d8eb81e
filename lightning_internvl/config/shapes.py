"""Where a configuration has settings below a name, and where a list or a text, so that a value in
their place is refused before anything reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.choices import PARTS
from lightning_internvl.messages import ConfigError

GROUPS = (*PARTS, "peft", "quantization", "optimizer", "scheduler", "trainer")
MAPPINGS = (
    *GROUPS, "init_parts", "data", "stages", "strategy", "callbacks", "logger", "paths", "peft.*", "callbacks.*", "logger.*",
    *(f"data.{kind}" for kind in ("pairs", "chats", "labels", "held_out")),
    *(f"data.{name}" for name in ("processor", "eval_processor", "pairs_collate", "chats_collate")),
    "stages.*", *(f"stages.*.{group}" for group in GROUPS), "stages.*.peft.*",
    *(f"stages.*.{name}" for name in ("module", "objectives", "evaluation", "samples", "collate", "datasets", "feature_cache")),
    "stages.*.evaluation.*", "stages.*.objectives.*", "optimizer.part_lr", "stages.*.optimizer.part_lr",
)  # fmt: skip
# of which null is no choice
NEEDED = (
    "encoder", "middleware", "stages", "data", "data.processor", "optimizer", "scheduler", "strategy", "trainer", "paths",
    "stages.*.module",
)  # fmt: skip
LISTS = ("trust", "stages.*.module.train", "stages.*.new", "stages.*.dropped")
TEXTS = ("init_from", "resume", "attention", "matmul_precision")


def check_shapes(config: Mapping[str, Any]) -> None:
    """Check that nothing stands in place of a group, a list or a text.

    Raises:
        ConfigError: with all such faults.
    """
    needed = (path for one in NEEDED for path, value in _at(config, one.split(".")) if value is None)
    faults = [f"{path}=null: no run is without; leave this out" for path in needed]
    for patterns, kind, words in (
        (MAPPINGS, Mapping, "holds settings, as {0}.NAME=VALUE gives one"),
        (LISTS, list, "must be a list: {0}=[A,B]"),
        (TEXTS, str, "must be a text"),
    ):
        for path, value in (found for one in patterns for found in _at(config, one.split("."))):
            if value is not None and not isinstance(value, kind):
                faults.append(f"{path}={value!r}: {path} {words.format(path)}")
    if faults:
        raise ConfigError(faults)


def check_run_shapes(config: Any, path: Path) -> None:
    """The same for the configuration of a run that was read from a file, which somebody may have
    changed; it has every group.

    Raises:
        ConfigError: with all such faults and the file.
    """
    groups = [name for name in NEEDED if "." not in name]
    lacking = groups if not isinstance(config, Mapping) else [name for name in (*groups, "pipeline") if name not in config]
    if lacking:
        raise ConfigError([f"{path} is no configuration of a run: it has no {', '.join(lacking)}"])
    try:
        check_shapes(config)
    except ConfigError as error:
        raise ConfigError([f"{path}: {error}"]) from error


def _at(node: Any, pattern: list[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """All places that a pattern means, with what stands there; those that are not there are left
    out."""
    if not pattern:
        yield path, node
        return
    names: Iterable[Any] = node if isinstance(node, Mapping) else ()
    for name in names:
        if pattern[0] in ("*", name):
            yield from _at(node[name], pattern[1:], f"{path}.{name}" if path else str(name))
