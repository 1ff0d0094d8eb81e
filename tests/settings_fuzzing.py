"""Settings of a run with one of them mutated on the command line, and how the command ends.

    PYTHONPATH=. python tests/settings_fuzzing.py 90 7     # so many mutations with this seed; prints each, and a table

A mutation is named (exit 2 and a message that says the setting), `unnamed` (exit 2 without it), accepted (the run ends well with
a value of the kind that stood there), `odd` (it ends well with one of another kind), a `traceback`, or a `hang`.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fuzzing import Hang, alarm
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import TINY, train

from lightning_internvl.files import CONF

SECONDS = 60
VALUES = (
    "null", "true", "false", "0", "-1", "2", "-0.5", "1.5", "1e30", "99999999999999999999", "nan", "inf", "-inf", '""', "foo",
    '"\u2028\u00fc"', "[]", "[1,2]", "{}", "{a: 1}", "???",
)  # fmt: skip
SHORT = (*TINY, "pipeline=[contrastive]", "stages.contrastive.max_steps=1", "callbacks.report=null")
ROOTS = (
    "encoder", "middleware", "optimizer", "scheduler", "trainer", "data", "callbacks", "strategy", "stages.contrastive", "seed",
    "attention", "name", "peft", "quantization", "matmul_precision", "max_steps", "epochs", "batch_size", "logger", "trust",
    "activation_checkpointing", "compile", "objective_metric", "init_from", "plan", "doctor",
)  # fmt: skip


def settings() -> dict[str, Any]:
    """Every setting of the short run by its dotted name, groups among them."""
    words = [word for word in SHORT if not word.startswith("callbacks.report")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[word for word in words if "=" in word])
    plain = OmegaConf.to_container(config)
    return {name: value for name, value in _leaves(plain) if name.startswith(ROOTS)}


def _leaves(node: Any, start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        name = f"{start}.{key}" if start else str(key)
        yield name, value
        yield from _leaves(value, name)


def is_odd(value: str, before: Any) -> bool:
    """Whether a word of the command line is of another kind than what stood there."""
    if value in ("nan", "inf", "-inf"):
        return True
    if value == "null" or before is None or (isinstance(before, str) and "${" in before):
        return False
    kinds = {"true": bool, "false": bool, "[]": list, "[1,2]": list, "{}": dict, "{a: 1}": dict, '""': str, "foo": str}
    number = value not in kinds and not value.startswith('"')
    kind = type(before)
    if number:
        return kind not in (int, float)
    return kinds.get(value, str) is not kind


def outcome(name: str, value: str, before: Any, run: Path) -> tuple[str, str]:
    """How the command ends, and what it says."""
    try:
        with alarm(SECONDS):
            done = train(*SHORT, f"{name}={value}", f"paths.run={run}")
    except Hang:
        return "hang", ""
    except Exception as error:  # what is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{error!r} {frame.filename}:{frame.lineno}"
    if done.code == 0:
        return "odd" if is_odd(value, before) else "accepted", ""
    said = done.err.partition("\nerror: ")[2].partition("\n(HYDRA")[0]
    last = name.rpartition(".")[2]
    return ("named" if done.code == 2 and last in said else "unnamed"), said or done.err[-300:]


def fuzz(count: int, folder: Path, seed: int) -> Iterator[tuple[str, str]]:
    """So many mutations: how each ends, and more about it."""
    rng, known = random.Random(seed), settings()
    for number in range(count):
        name, value = rng.choice(list(known)), rng.choice(VALUES)
        with contextlib.chdir(folder):
            what, more = outcome(name, value, known[name], folder / f"run{number}")
        yield what, f"{number:3} {what:9} {name}={value} | {' '.join(more.split()):.260}"


if __name__ == "__main__":
    begun, table = time.process_time(), Counter[str]()
    with tempfile.TemporaryDirectory() as made:
        for ending, line in fuzz(int(sys.argv[1]), Path(made), int(sys.argv[2])):
            table[ending] += 1
            print(line, flush=True)
    print(dict(table), f"{time.process_time() - begun:.0f} s of CPU")
