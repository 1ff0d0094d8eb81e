"""`torch.compile` for blocks, one by one and in place: equal blocks share what is compiled, and
names of tensors stay. With the decoder's blocks goes what judges its logits."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import nn

from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.console import console
from lightning_internvl.objectives.linear_cross_entropy import losses_and_gradient
from lightning_internvl.objectives.next_token import NextToken
from lightning_internvl.protocols import HasShardingUnits

# the backend that makes code; the others run the graph as it is, to find faults
INDUCTOR = "inductor"
# variants of one kind of block: rows that vary in size, with a graph and without, training and not,
# each
LIMIT = 64
AUTO = "auto"
WORTH = 50_000_000  # weights of a part whose blocks `auto` compiles, which takes half a minute or more


def compile_blocks(model: nn.Module, settings: Mapping[str, str | bool | None]) -> None:
    """Compile the blocks of parts when they first run. Call it after `recompute_blocks` and before
    weights are divided.

    Sizes that turn out to vary, as rows of text do, are compiled once as variables; others stay
    constants.

    Args:
        settings: by part: true (inductor), the name of a backend, or None or false.
    """
    limit = {"recompile_limit": LIMIT}
    if "recompile_limit" not in signature(torch.compile).parameters:  # before PyTorch 2.12
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
        limit = {}
    for name, backend in settings.items():
        part = getattr(model, name, None)
        if backend and isinstance(part, HasShardingUnits):
            how: dict[str, Any] = {"backend": INDUCTOR if backend is True else backend, "dynamic": None, **limit}
            for block in part.sharding_units():
                block.compile(**how)
            for objective in model.modules() if name == "decoder" else ():
                if isinstance(objective, NextToken):
                    objective.judge = torch.compile(losses_and_gradient, **how)


def chosen_blocks(settings: StageSettings, model: nn.Module) -> dict[str, str | bool | None]:
    """What a stage compiles, by part, with a choice in place of `auto`, which is told where there is a GPU.

    That is the parts with blocks that are large enough to gain more than it takes to compile them,
    where there is a GPU and what PyTorch needs to make code for it. Quantised layers and layers
    divided by tensor parallelism have not been shown to work compiled and are left alone. A block
    that turns out not to compile runs as it is.
    """
    asked = [name for name, word in settings.compile.items() if word == AUTO and hasattr(model, name)]
    chosen = {name: None if word == AUTO else word for name, word in settings.compile.items()}
    if not asked or not _is_gpu(settings.trainer.accelerator):
        return chosen
    missing, divided = _missing_for_gpu(), settings.strategy.get("tensor_parallel_size", 1) > 1
    parts = [] if missing or divided else [name for name in asked if not settings.parts.quantization.get(name)]
    found = [name for name in parts if _is_worth_it(getattr(model, name))]
    why = f"{missing} is not there" if missing else f"no part with {WORTH // 10**6} M weights, neither quantised nor divided"
    told = f"the blocks of {', '.join(found)}; compile=false leaves it out" if found else f"nothing; {why}"
    console.print(f"compile: {told}", soft_wrap=True, markup=False)
    torch._dynamo.config.suppress_errors = torch._dynamo.config.suppress_errors or bool(found)
    return chosen | dict.fromkeys(found, True)


def _is_worth_it(part: nn.Module) -> bool:
    return isinstance(part, HasShardingUnits) and sum(p.numel() for p in part.parameters()) >= WORTH


def check_compiler(settings: Mapping[str, str | bool | None], accelerator: str) -> None:
    """Refuse to compile where nothing can; `auto` does without.

    Args:
        accelerator: what the trainer was asked for: cpu, gpu, auto, ...

    Raises:
        ValueError: with what is missing.
    """
    if not {True, INDUCTOR} & set(settings.values()):
        return
    missing = _missing_for_gpu() if _is_gpu(accelerator) else _missing_for_cpu()
    if missing:
        raise ValueError(f"compile=true needs {missing}, which is not there; install it, or leave compile out")


def _is_gpu(accelerator: str) -> bool:
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def _missing_for_gpu() -> str | None:
    if find_spec("triton") is None:
        return "Triton (pip install triton)"
    # Triton makes a launcher of each kernel in C
    names = [os.environ.get("CC"), "gcc", "clang", "cc"]
    return None if any(shutil.which(name) for name in names if name) else "a C compiler (gcc, or what the variable CC names)"


def _missing_for_cpu() -> str | None:
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler}, or what the variable CXX names)"
