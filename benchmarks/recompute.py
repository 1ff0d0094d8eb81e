"""What activation checkpointing saves and costs, and what `torch.compile` brings: the steps of one stage in five ways, in turns.

python benchmarks/recompute.py                              # 1.9 M parameters, on a CPU; compiling takes half a minute
python benchmarks/recompute.py sizes=170M steps=4 ways=null,selective,full
python benchmarks/recompute.py sizes=1B device=cuda         # InternVL2-1B's own size, in bf16 autocast

Supervised training of native InternVL, all parts, forward and backward; ways are joined with `+`. Memory is what a forward pass
leaves alive beside the weights: on a CPU the storages that it has made and that something still holds, on a GPU
`max_memory_allocated` of the whole step above what was there. Losses of the same batch stand beside. Prints one JSON line.
"""

from __future__ import annotations

import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from alignment_step import SIZES as LARGE
from alternating import arguments, now, report
from peaks import MIB, Alive
from supervised_step import SIZES, batch, native_folder
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.choices import by_part
from lightning_internvl.model.vlm import VLM
from lightning_internvl.training.activation_checkpointing import recompute_blocks
from lightning_internvl.training.compile import compile_blocks


def kept(model: VLM, loss_of: Callable[[VLM], Tensor], device: str) -> float:
    """MiB that a step needs beside the weights."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(model).backward()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with Alive(model) as alive:
        loss = loss_of(model)
    found = alive.bytes
    loss.backward()
    return found / MIB


def prepared(model: VLM, way: str) -> VLM:
    """A copy of the model in one way."""
    found, words = copy.deepcopy(model).train(), way.split("+")
    recompute_blocks(found, by_part(next((word for word in words if word in ("full", "selective")), None)))
    compile_blocks(found, by_part("compile" in words))
    return found


def measure(size: dict[str, Any], steps: int, device: str, ways: list[str]) -> dict[str, Any]:
    """All ways over the same batch, in turns."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        native_folder(size, Path(folder, "native"))
        model = load_pretrained(Path(folder, "native")).to(device)
    inputs = {name: tensor.to(device) for name, tensor in batch(size).items()}
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")

    def loss_of(model: VLM) -> Tensor:
        with autocast():
            return model(**inputs).loss

    models = {way: prepared(model, way) for way in ways}
    found: dict[str, dict[str, Any]] = {way: {} for way in ways}
    for way, one in models.items():
        began = time.perf_counter()
        found[way]["loss"] = float(loss_of(one).detach())
        loss_of(one).backward()
        found[way]["start_s"] = round(time.perf_counter() - began, 1)
        if "compile" not in way or device == "cuda":  # what compiled code makes cannot be seen on a CPU
            found[way]["kept_MiB"] = round(kept(one, loss_of, device), 1)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(steps):
        for way, one in models.items():
            began = now()
            loss_of(one).backward()
            times[way].append(1e3 * (now() - began))
    for way in ways:
        quarters = statistics.quantiles(times[way], n=4)
        found[way] |= {"ms": round(statistics.median(times[way]), 1), "quartiles_apart_ms": round(quarters[2] - quarters[0], 1)}
        found[way]["time_ratio"] = round(statistics.median(times[way]) / statistics.median(times[ways[0]]), 3)
        if "kept_MiB" in found[way]:
            found[way]["memory_ratio"] = round(found[way]["kept_MiB"] / found[ways[0]]["kept_MiB"], 3)
    return {"parameters_M": round(sum(p.numel() for p in model.parameters()) / 1e6, 1), "steps": steps, "ways": found}


def main() -> None:
    """Measure the sizes asked for."""
    options = arguments(sizes="toy", steps=20, device="cpu", ways="null,selective,full,compile,selective+compile")
    sizes = LARGE | SIZES
    ways = options["ways"].split(",")
    results = {name: measure(sizes[name], options["steps"], options["device"], ways) for name in options["sizes"].split(",")}
    report("recompute", {"transformers": transformers.__version__}, {"sizes": results})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
