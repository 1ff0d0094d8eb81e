"""A contrastive step in chunks: similarities a few rows at a time, and pairs embedded a few at a time (GradCache).

python benchmarks/contrastive_memory.py
python benchmarks/contrastive_memory.py pairs=16384 rows=256 batch=512 embedded=32 steps=5

`similarities` is the loss alone over `pairs` embeddings of width 256 and `rows` at a time, forward and backward. `embedding` is a
whole step of two toy towers over a batch of `batch` pairs, `embedded` at a time. Memory is the peak beside weights and inputs,
gradients included; each is compared with the same done whole. Prints one JSON line.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alternating import arguments, now, report
from contrastive_step import SIZES, batch, clip
from peaks import peak
from torch import nn

from lightning_internvl.objectives import ITC, SigLIP
from lightning_internvl.stages import ContrastiveStage

WIDTH = 256


def similarities(objective: type[nn.Module], pairs: int, chunk: int | None) -> Callable[[], None]:
    """The loss of many embeddings, ready to run."""
    torch.manual_seed(0)
    loss, (image, text) = objective(chunk=chunk), torch.randn(2, pairs, WIDTH).unbind()
    loss(image[:8].clone().requires_grad_(), text[:8]).backward()  # libraries take their own memory at first use
    image.requires_grad_(), text.requires_grad_()
    return lambda: loss(image, text).backward()


def embedding(pairs: int, chunk: int | None) -> Callable[[], None]:
    """A step of two towers, ready to run."""
    torch.manual_seed(0)
    size = SIZES["toy"]
    stage = ContrastiveStage(
        clip(size), name="contrastive", run_dir=Path(tempfile.gettempdir()), parts={}, train=["*"], cached_chunk=chunk,
        optimizer=torch.optim.AdamW, scheduler=torch.optim.lr_scheduler.LambdaLR, max_steps=1,
    )  # fmt: skip
    pictures, few = batch(size | {"batch": pairs}), batch(size | {"batch": 2})
    stage.losses(few)["itc"].backward()

    def work() -> None:
        stage.zero_grad()
        stage.losses(pictures)["itc"].backward()

    return work


def seconds(works: list[Callable[[], Any]], steps: int) -> list[float]:
    """Medians of several ways to do the same, by turns."""
    times: list[list[float]] = [[] for _ in works]
    for step in range(steps + 1):
        for work, found in zip(works, times, strict=True):
            begun = now()
            work()
            found += [now() - begun] if step else []  # the first one warms up
    return [statistics.median(found) for found in times]


def main() -> None:
    """Measure and report: memory first, while this process, of which each measurement gets a copy, has done nothing."""
    sizes = arguments(pairs=8192, rows=128, batch=128, embedded=16, steps=3)
    cases: dict[str, tuple[Callable[..., Callable[[], Any]], int]] = {
        "itc": (partial(similarities, ITC, sizes["pairs"]), sizes["rows"]),
        "siglip": (partial(similarities, SigLIP, sizes["pairs"]), sizes["rows"]),
        "cached": (partial(embedding, sizes["batch"]), sizes["embedded"]),
    }
    memory = {name: [peak(make, size) for size in (None, chunk)] for name, (make, chunk) in cases.items()}
    results = {}
    for name, (make, chunk) in cases.items():
        (whole, chunked), peaks = seconds([make(None), make(chunk)], sizes["steps"]), memory[name]
        results[name] = {"whole_MiB": peaks[0], "chunked_MiB": peaks[1], "memory_ratio": round(peaks[1] / peaks[0], 3)}
        times = {"whole_ms": 1e3 * whole, "chunked_ms": 1e3 * chunked, "time_ratio": chunked / whole}
        results[name] |= {key: round(value, 3) for key, value in times.items()}
    report("contrastive_memory", {}, {"sizes": sizes, **results})


if __name__ == "__main__":
    main()
