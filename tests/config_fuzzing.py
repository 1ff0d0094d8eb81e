"""Configurations of checkpoints with one field mutated, and what opening and using them gives.

    PYTHONPATH=. python tests/config_fuzzing.py 1000 7     # so many mutations with this seed; prints a table

A mutation is named (a ValueError that says the field), read (nothing that is computed depends on the field, or the value is a
valid one), `wrong` (a value of another kind, or one that is no number, takes part in what is computed), `unnamed`
(a ValueError without the field), a `traceback`, or a `hang`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fuzzing import Hang, alarm

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import layout_of_checkpoint
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.layers.config_values import KINDS, SECTIONS
from lightning_internvl.model.vlm import VLM

SECONDS = 10
FIXTURES = Path(__file__).parent / "fixtures"
ODD: list[Any] = [
    None, True, False, 0, -1, 2, 0.5, -0.5, 1.5, 1e30, 10**20, float("nan"), float("inf"), float("-inf"), "", "foo", "7",
    "\u2028ü", [], [1, 2], ["a"], {}, {"a": 1},
]  # fmt: skip
MISSING = object()
Place = tuple[str, ...]


def folders() -> list[Path]:
    """The checkpoints among the fixtures."""
    found = []
    for path in sorted(FIXTURES.glob("*/*/model.safetensors")):
        try:
            layout_of_checkpoint(json.loads((path.parent / "config.json").read_text()), WeightFiles(path.parent).shapes)
        except ValueError:
            continue
        found.append(path.parent)
    return found


def places(config: Any, start: Place = ()) -> Iterator[Place]:
    """Where values stand in a configuration, sections among them."""
    for name, value in config.items() if isinstance(config, dict) else ():
        yield (*start, name)
        yield from places(value, (*start, name))


def mutated(config: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(config)
    section = found
    for name in place[:-1]:
        section = section[name]
    if value is MISSING:
        del section[place[-1]]
    else:
        section[place[-1]] = value
    return found


def value_at(config: dict[str, Any], place: Place) -> Any:
    return functools.reduce(lambda section, name: section[name], place, config)


IDS, MASK = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long)


def pixels(model: VLM) -> torch.Tensor:
    side = model.encoder.image_size
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


# What a model is asked, part by part; not every model has an answer to all
PROBES: dict[str, Callable[[VLM], Any]] = {
    "placeholders": lambda model: repr((model.image_token_id, model.video_token_id, model.image_placeholders)),
    "encoder": lambda model: model.encoder(pixels(model), layers=model.middleware.layers if model.middleware else (-1,)),
    "patches": lambda model: model.encoder(torch.ones(4, 1176), image_grid_thw=torch.tensor([[1, 2, 2]]), layers=(-1,)),
    "visual tokens": lambda model: model.visual_tokens(pixels(model)),
    "image": lambda model: model.encode_image(pixels(model)),
    "text": lambda model: model.encode_text(IDS, MASK),
    "decoder": lambda model: model.decoder.head(model.decoder.hidden(model.decoder.embed(IDS), MASK)),
}


@torch.no_grad()
def computed(model: VLM, probes: Iterable[str]) -> dict[str, Any]:
    """What a model answers to the probes."""
    return {name: PROBES[name](model) for name in probes}


@torch.no_grad()
def answered(folder: Path) -> dict[str, Any]:
    """What a model answers to the probes that it has an answer to."""
    model, found = load_pretrained(folder), {}
    for name, probe in PROBES.items():
        with suppress(Exception):
            found[name] = probe(model)
    return found


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [leaf for one in value for leaf in flat(one)] if isinstance(value, list | tuple) else [value]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(flat(one), flat(other), strict=False))
    return len(flat(one)) == len(flat(other)) and all(
        a.shape == b.shape and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs
    )


def is_finite(found: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in flat(found) if isinstance(x, torch.Tensor))


def is_another_kind(value: Any, before: Any) -> bool:
    """Whether a value is of another kind than the one before, or no number."""
    number = (int, float)
    if value is MISSING or value is None or before is None:
        return False
    if isinstance(value, bool) or isinstance(before, bool):
        return type(value) is not type(before)
    if isinstance(value, number) and isinstance(before, number):
        return value != value or abs(value) == float("inf") or (isinstance(before, int) and not isinstance(value, int))
    return type(value) is not type(before)


def outcome(folder: Path, place: Place, value: Any, before: Any, expected: dict[str, Any]) -> tuple[str, str]:
    """What opening and using a checkpoint gives, and more about it."""
    try:
        with alarm(SECONDS), warnings.catch_warnings(action="ignore"):
            found = computed(load_pretrained(folder), expected)
    except ValueError as error:
        said = str(error)
        section = place[-1] in SECTIONS and isinstance(value, dict | type(None))
        alone = section or value is MISSING or (place[-1] in KINDS and KINDS[place[-1]].holds(value))  # it does not fit others
        return ("named" if place[-1] in said.replace(" ", "_") or alone else "unnamed"), f"{type(error).__name__} {said}"
    except Hang:
        return "hang", ""
    except Exception as error:  # what is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{error!r} {os.path.basename(frame.filename)}:{frame.lineno}"
    if same(found, expected):
        return "read", "without effect"
    valid = place[-1] in KINDS and value is not MISSING and KINDS[place[-1]].holds(value)
    odd = not is_finite(found) or (is_another_kind(value, before) and not valid)
    return ("wrong" if odd else "read"), "with effect"


def fuzz(count: int, folder: Path, seed: int, sources: Sequence[Path]) -> tuple[Counter[str], list[str]]:
    """So many mutations over these checkpoints: outcomes, and what is neither named nor read."""
    rng, found, faults = random.Random(seed), Counter[str](), list[str]()
    expected: dict[Path, dict[str, Any]] = {}
    for number in range(count):
        source = rng.choice(sources)
        config = json.loads((source / "config.json").read_text())
        place = rng.choice(list(places(config)))
        value = rng.choice([*ODD, MISSING])
        target = folder / source.name
        if not target.is_dir():
            target.mkdir()
            (target / "model.safetensors").symlink_to(source / "model.safetensors")
            (target / "config.json").write_text(json.dumps(config))
            expected[source] = answered(target)
        (target / "config.json").write_text(json.dumps(mutated(config, place, value)))
        what, more = outcome(target, place, value, value_at(config, place), expected[source])
        found[what] += 1
        if what not in ("named", "read"):
            shown = "absent" if value is MISSING else repr(value)
            faults.append(f"{number} {source.name} {'.'.join(place)}={shown}: {what} {more:.300}")
    return found, faults


if __name__ == "__main__":
    begun = time.process_time()
    numbers = [int(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as made:
        table, bad = fuzz(numbers[0], Path(made), numbers[1], folders())
    print("\n".join(bad), dict(table), f"{len(bad)} faults, {time.process_time() - begun:.0f} s of CPU", sep="\n")
