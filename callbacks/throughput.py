"""Counts what really went through: samples, real tokens (not padding), and their FLOPs."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_internvl.console import console
from lightning_internvl.data.collate.embedding import batches_of
from lightning_internvl.distributed.collectives import data_parallel_rank_and_size
from lightning_internvl.files import read_json, write_json
from lightning_internvl.messages import check_number
from lightning_internvl.plan.flops import Amount, Flops, NotMeasurableError, amount_of, measure_flops, peak_flops
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext

GIB = 2**30


class Throughput(L.Callback):
    """Samples/s, text tokens/s, model FLOP/s, their share of the device's peak (MFU), padding share
    and peak memory, logged every `every_n_steps` and summed up in `timing.json`.

    Everything is counted on the device and read once a report, so that no step waits for it. The
    first `skip_steps` steps, in which kernels and caches warm up, do not count. How FLOPs are
    counted: `lightning_internvl.plan.flops`.

    Args:
        peak_tflops: dense TFLOP/s of one device in the precision that is trained in; None: as
            stated for known GPUs.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 20,
        skip_steps: int = 5,
        peak_tflops: float | None = None,
    ) -> None:
        if peak_tflops is not None:
            note = ": TFLOP/s of one device"
            check_number("callbacks.throughput.peak_tflops", peak_tflops, above=0, note=note)
        self.every_n_steps, self.skip_steps, self.peak_tflops = every_n_steps, skip_steps, peak_tflops
        self.total = self.window = _Count()
        self.flops: dict[int, Flops | None] = {}  # by the step from which they hold
        self.context: StageContext | None = None  # without one FLOPs are not measured

    def setup_stage(self, context: StageContext) -> None:
        """FLOPs are measured when they are reported first."""
        self.context = context

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self.total, self.window, self.begun = _Count(), _Count(), time.monotonic()
        self.peak, self.peak_from = peak_flops(pl_module.device, self.peak_tflops)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = trainer.global_step - pl_module.start_step
        if seen <= self.skip_steps:
            self.total, self.window = _Count(), _Count()
            return
        last_step = batch_idx // trainer.accumulate_grad_batches
        state = max(step for step in pl_module.plan.changes() if step <= last_step)
        for count in (self.total, self.window):
            count.add(batch, state)
        if trainer.global_step % self.every_n_steps == 0:
            rates = self.rates(self.window, trainer, pl_module)
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
                **{name: float(f"{value:.6g}") for name, value in self.rates(self.total, trainer, pl_module).items()},
                "peak_memory_gib": round(peak_memory(), 3),
            }
            write_json(path, timing)

    def rates(self, count: _Count, trainer: L.Trainer, stage: Stage) -> dict[str, float]:
        """What went through per second, in all processes together."""
        _, size = data_parallel_rank_and_size(trainer)
        seconds = max(time.monotonic() - count.since, 1e-9) / size
        tokens = float(sum(amount.tokens for amount in count.amounts.values()))
        rates = {
            "samples_per_s": count.samples / seconds,
            "tokens_per_s": tokens / seconds,
            "padding_share": 1 - tokens / count.places if count.places else 0.0,
        }
        begun, flops = time.monotonic(), 0.0
        for state, amount in count.amounts.items():
            found = self._flops_at(state, stage)
            if found is None:
                return rates
            flops += sum(found.of(amount).values())
        for running in (self.total, self.window):  # measuring was no training
            running.since += time.monotonic() - begun
        if flops:
            rates["model_tflops_per_s"] = flops / seconds / 1e12
            rates |= {"mfu": flops / seconds / trainer.world_size / self.peak} if self.peak else {}
        return rates

    def _flops_at(self, state: int, stage: Stage) -> Flops | None:
        """The FLOPs of a step, measured and printed once for each state of freezing; None where
        they cannot be measured."""
        if self.context is None or state in self.flops:
            return self.flops.get(state)
        try:
            blank = self.context.view.training.blank
            self.flops[state] = measure_flops(self.context.settings, blank, self.context.build, state)
            message = f"FLOPs of a step from step {state} on: {self.flops[state]}"
        except NotMeasurableError as error:
            self.flops[state] = None
            message = f"FLOPs are not counted, the stage cannot be measured on the meta device: {error}"
        peak = f"{self.peak / 1e12:g} TFLOP/s" if self.peak else "none"
        console.print(f"{stage.name}: {message}\n{stage.name}: peak for MFU: {peak} ({self.peak_from})", soft_wrap=True)
        return self.flops[state]


class _Count:
    """Samples, token places, and by state of freezing all that takes FLOPs, since a moment."""

    def __init__(self) -> None:
        self.since, self.samples, self.places = time.monotonic(), 0, 0
        self.amounts: dict[int, Amount] = {}

    def add(self, batch: dict[str, Any], state: int) -> None:
        named = (one for rows in batches_of(batch) for one in rows.items())
        masks = [value for name, value in named if name.endswith("mask") and isinstance(value, Tensor)]
        self.samples += len(batch["keys"])
        self.places += sum(mask.numel() for mask in masks)
        self.amounts[state] = self.amounts.get(state, Amount()).plus(amount_of(batch))


def peak_memory() -> float:
    """GiB: of the device where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB
