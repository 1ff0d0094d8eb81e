"""`torch.compile` for blocks, one by one and in place: equal blocks share what is compiled, and
names of tensors stay."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from inspect import signature

import torch
from torch import nn

from lightning_internvl.protocols import HasShardingUnits

# the backend that makes code; the others run the graph as it is, to find faults
INDUCTOR = "inductor"
# variants of one kind of block: rows that vary in size, with a graph and without, training and not,
# each
LIMIT = 64


def compile_blocks(model: nn.Module, settings: Mapping[str, str | bool | None]) -> None:
    """Compile the blocks of parts when they first run. Call it after `recompute_blocks` and before
    weights are divided.

    Sizes that turn out to vary, as rows of text do, are compiled once as variables; others stay
    constants.

    Args:
        settings: by part: true (inductor), the name of a backend, or None.
    """
    limit = {"recompile_limit": LIMIT}
    if "recompile_limit" not in signature(torch.compile).parameters:  # before PyTorch 2.12
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
        limit = {}
    for name, backend in settings.items():
        part = getattr(model, name, None)
        if backend and isinstance(part, HasShardingUnits):
            for block in part.sharding_units():
                block.compile(backend=INDUCTOR if backend is True else backend, dynamic=None, **limit)


def check_compiler(settings: Mapping[str, str | bool | None], accelerator: str) -> None:
    """Refuse to compile where nothing can.

    Args:
        accelerator: what the trainer was asked for: cpu, gpu, auto, ...

    Raises:
        ValueError: with what is missing.
    """
    if not {True, INDUCTOR} & set(settings.values()):
        return
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        found, missing = find_spec("triton") is not None, "Triton (pip install triton)"
    else:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        found, missing = shutil.which(compiler) is not None, f"a C++ compiler ({compiler}, or what the variable CXX names)"
    if not found:
        raise ValueError(f"compile=true needs {missing}, which is not there; install it, or leave compile out")
