"""Two training steps compared in one process, taking turns, so that a machine that speeds up or slows down does so for both."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning as L
import torch

from callbacks import Freezing, Throughput
from lightning_internvl.console import console
from lightning_internvl.pipeline import quiet_lightning
from lightning_internvl.stages import Stage

WARM_UP = 5  # steps that do not count


class Alternating:
    """Ready batches for a trainer; before each one the other side takes a step of its own.

    The other side's time is that of its step; the trainer's is that from one batch to the next request, so everything between
    counts.
    """

    def __init__(self, batches: list[Any], steps: int, other_step: Callable[[int], None]) -> None:
        self.batches, self.steps, self.other_step = batches, steps, other_step
        self.other, self.trainer = list[float](), list[float]()

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.steps):
            asked = now()
            self.other_step(step % len(self.batches))
            given = now()
            yield self.batches[step % len(self.batches)]
            self.other.append(given - asked)
            self.trainer.append(now() - given)

    def __len__(self) -> int:
        return self.steps

    def result(self, other: str, warm_up: int = WARM_UP) -> dict[str, float]:
        """Milliseconds a step of both sides: medians, the spread between the quartiles, and the ratio of ours to the other."""
        theirs, ours = ([1e3 * seconds for seconds in times[warm_up:]] for times in (self.other, self.trainer))
        found: dict[str, float] = {}
        for name, times in {other: theirs, "trainer": ours}.items():
            quarters = statistics.quantiles(times, n=4)
            found |= {f"{name}_ms": statistics.median(times), f"{name}_quartiles_apart_ms": quarters[2] - quarters[0]}
        found["ratio"] = statistics.median(ours) / statistics.median(theirs)
        found["ratio_of_means"] = statistics.fmean(ours) / statistics.fmean(theirs)
        return {name: round(value, 3) for name, value in found.items()} | {"steps": len(ours)}


def now() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def against(
    stage: Stage, batches: list[Any], steps: int, other_step: Callable[[int], None], other: str, device: str = "auto"
) -> dict[str, float]:
    """Our trainer over a stage beside another side's step over the same batches; on `cuda` in bf16."""
    quiet_lightning()
    console.quiet = True
    trainer = L.Trainer(
        max_steps=steps + WARM_UP, accelerator=device, devices=1, precision="bf16-mixed" if device == "cuda" else "32-true",
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=1.0,
        callbacks=[Freezing(), Throughput(every_n_steps=20)],
    )  # fmt: skip
    loop = Alternating(batches, steps + WARM_UP, other_step)
    trainer.fit(stage, loop)
    return loop.result(other)


def plain_step(model: torch.nn.Module, loss_of: Callable[[int], torch.Tensor], lr: float) -> Callable[[int], None]:
    """A step of the shortest loop: loss of a batch by its number, gradients, clipping, fused AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step(number: int) -> None:
        loss = loss_of(number)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def arguments(**defaults: Any) -> dict[str, Any]:
    """`name=value` words of the command line over the defaults, each read as the kind of its default."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := given.keys() - defaults.keys():
        sys.exit(f"{', '.join(unknown)}: not known; valid choices: {', '.join(defaults)}")
    return {name: type(value)(given.get(name, value)) for name, value in defaults.items()}


def report(benchmark: str, versions: dict[str, str], results: dict[str, Any]) -> None:
    """Print one JSON line with the machine beside the figures."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    machine = {"device": device, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"benchmark": benchmark, **machine, **versions, **results}))
