"""Counts what really went through: samples and real tokens, not padding."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_internvl.files import read_json, write_json
from lightning_internvl.stages import Stage

GIB = 2**30


class Throughput(L.Callback):
    """Samples/s, text tokens/s, padding share and peak memory, logged every `every_n_steps` and summed up in `timing.json`.

    Tokens are counted on the device and read once a report, so that no step waits for the device. The first `skip_steps` steps,
    in which kernels and caches warm up, do not count.
    """

    def __init__(self, *, every_n_steps: int = 20, skip_steps: int = 5) -> None:
        self.every_n_steps, self.skip_steps = every_n_steps, skip_steps
        self.total = self.window = _Count()

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self.total, self.window, self.begun = _Count(), _Count(), time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = trainer.global_step - pl_module.start_step
        if seen <= self.skip_steps:
            self.total, self.window = _Count(), _Count()
            return
        for count in (self.total, self.window):
            count.add(batch)
        if trainer.global_step % self.every_n_steps == 0:
            rates = self.window.rates(trainer.world_size)
            pl_module.log_dict({f"throughput/{name}": value for name, value in rates.items()})
            self.window = _Count()

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        if trainer.is_global_zero:
            path = pl_module.run_dir / "timing.json"
            timing = read_json(path, {})
            earlier = timing.get(pl_module.name, {}).get("train_seconds", 0.0) if pl_module.start_step else 0.0
            timing[pl_module.name] = {
                "steps": trainer.global_step,
                "train_seconds": round(earlier + time.monotonic() - self.begun, 2),
                **{name: round(value, 3) for name, value in self.total.rates(trainer.world_size).items()},
                "peak_memory_gib": round(peak_memory(), 3),
            }
            write_json(path, timing)


class _Count:
    """Samples, tokens and token places since a moment."""

    def __init__(self) -> None:
        self.since, self.samples, self.places = time.monotonic(), 0, 0
        self.tokens: Tensor | int = 0

    def add(self, batch: dict[str, Any]) -> None:
        masks = [value for name, value in batch.items() if name.endswith("mask")]
        self.samples += len(batch["keys"])
        self.places += sum(mask.numel() for mask in masks)
        self.tokens = self.tokens + sum(mask.sum() for mask in masks)

    def rates(self, world_size: int) -> dict[str, float]:
        seconds, tokens = max(time.monotonic() - self.since, 1e-9), float(self.tokens)
        return {
            "samples_per_s": self.samples * world_size / seconds,
            "tokens_per_s": tokens * world_size / seconds,
            "padding_share": 1 - tokens / self.places if self.places else 0.0,
        }


def peak_memory() -> float:
    """GiB: of the device where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB
