"""`train.py` called in this process, on models and data so small that a whole run takes a second or two."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import quick_hydra  # noqa: F401
import torch
import yaml
from hydra._internal.hydra import Hydra
from processes import Started
from safetensors.torch import load_file
from torch import Tensor

from lightning_internvl.distributed import checkpoint_writing
from lightning_internvl.distributed.checkpoint_files import checkpoint_step
from lightning_internvl.files import into_place

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("contrastive", "generative", "words", "supervised")
TINY = (
    "debug=fast",
    "encoder.image_size=48", "encoder.patch_size=24", "encoder.dim=16", "encoder.depth=1", "encoder.heads=2",
    "encoder.mlp_dim=16",
    "middleware.dim=16", "middleware.depth=2", "middleware.heads=2", "middleware.mlp_dim=16", "middleware.num_queries=2",
    "middleware.embed_dim=8", "middleware.pool_heads=2",
    "decoder.config.hidden_size=16", "decoder.config.intermediate_size=16", "decoder.config.num_hidden_layers=1",
    "decoder.config.num_attention_heads=2", "decoder.config.num_key_value_heads=2",
    *(f"stages.{stage}.batch_size=4" for stage in STAGES),
    "callbacks.progress=null", "data.held_out.scenes=12", "data.held_out.questions=8", "callbacks.samples.images=2",
)  # fmt: skip

WITHOUT_DECODER = {"contrastive", "generative", "probe", "retrieval", "filter"}  # stages


class Outcome(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


def fitting(words: Sequence[str]) -> list[str]:
    """Words of a command line, without those for the default recipe's other stages, which a command refuses."""
    given = dict(word.partition("=")[::2] for word in words)
    recipe = ROOT / f"conf/experiment/{given.get('experiment')}.yaml"
    names = yaml.safe_load(recipe.read_text()).get("pipeline", []) if recipe.is_file() else []
    names = given["pipeline"].strip("[]").split(",") if "pipeline" in given else names
    if not names:
        return list(words)
    vain = tuple(f"stages.{stage}." for stage in STAGES if stage not in names)
    no_decoder = tuple(word for word in TINY if word.startswith("decoder.") and WITHOUT_DECODER.issuperset(names))
    return [word for word in words if not word.lstrip("+~").startswith(vain) and word not in no_decoder]


def once(*words: str) -> tuple[str, ...]:
    """Words of a command line; of those for the same setting, which a command refuses, the last."""
    words = fitting(words)
    return tuple({word.partition("=")[0].lstrip("+") if "=" in word else word: word for word in words}.values())


class Crash(RuntimeError):
    """Stands for anything that ends a process."""


@contextlib.contextmanager
def stopped_before(step: int, stage: type) -> Iterator[None]:
    """The run inside crashes where a stage, a class, would take this step."""
    original: Any = stage.training_step  # type: ignore[attr-defined]  # of a stage

    def crashing(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == step:
            raise Crash
        return original(self, batch, batch_idx)

    with patch.object(stage, "training_step", crashing), pytest.raises(Crash):
        yield


@contextlib.contextmanager
def every_checkpoint() -> Iterator[None]:
    """Keep a copy of each checkpoint that is written inside: `step-N.ckpt` beside it."""

    def place_and_keep(draft: Path, path: Path) -> None:
        into_place(draft, path)
        kept = path.with_name(f"step-{checkpoint_step(path)}.ckpt")
        (shutil.copytree if path.is_dir() else shutil.copy)(path, kept)

    with patch.object(checkpoint_writing, "into_place", place_and_keep):
        yield


def train(*arguments: str) -> Outcome:
    """`python train.py ARGUMENTS`; of a setting that stands there several times, as one of `TINY` may, the last holds."""
    arguments = once(*arguments)
    if any(word.startswith("-") for word in arguments):
        return call("train.py", *arguments)
    with patch.object(Hydra, "get_mode", lambda *_, **__: None):  # which composes all once more to find that this is no sweep
        return call("train.py", *arguments)


def call(script: str, *arguments: str, typed: str = "") -> Outcome:
    """`python SCRIPT ARGUMENTS`, with lines that somebody types."""
    arguments = tuple(fitting(arguments))
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", [script, *arguments]),
        patch.object(sys, "stdin", io.StringIO(typed)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            torch.use_deterministic_algorithms(False)
    return Outcome(code, out.getvalue(), err.getvalue())


def train_apart(*arguments: str) -> Outcome:
    """`python train.py ARGUMENTS` in a process of its own, which Lightning ends with all others where several may have a part."""
    done = Started("train.py", *once(*arguments))
    return Outcome(done.wait(), done.out, done.err)


def tiny_run(folder: Path, *overrides: str) -> Path:
    """A finished tiny run in `folder`."""
    outcome = train(*TINY, f"paths.run={folder}", *overrides)
    assert outcome.code == 0, outcome.err
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(run: Path, stage: str) -> dict[str, Tensor]:
    """The tensors that a stage handed over."""
    files = sorted((run / "handoff" / stage).glob("*.safetensors"))
    assert files, f"{stage} of {run} has handed over nothing"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_weights(one: Path, two: Path, stage: str) -> bool:
    """Whether a stage of two runs has handed over the same bits."""
    a, b = weights(one, stage), weights(two, stage)
    return a.keys() == b.keys() and all(tensor.equal(b[name]) for name, tensor in a.items())


def losses(run: Path, stage: str) -> list[dict[str, float]]:
    """The losses of a stage by step, as logged."""
    rows = [json.loads(line) for line in (run / "stages" / stage / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k == "step" or k.startswith("train/")} for row in rows if "train/loss" in row]
