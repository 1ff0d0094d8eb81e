"""How long a stage would take, and what that costs: its FLOPs by a stated or measured rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.distributed.collectives import single_process
from lightning_internvl.layers.attention import choose_backend, keep_backend, requested_backend
from lightning_internvl.model.compose import Build
from lightning_internvl.plan.flops import stated_peak
from lightning_internvl.plan.stage_plan import StagePlan, stage_plan

TFLOPS = 989  # of a device that nothing is known of: an H100, dense bf16
UTILISATION = 0.4  # of it, as training of this kind reaches on GPUs
UNKNOWN = "hours: device_tflops=N, the peak of a device, gives an estimate"


@dataclass(frozen=True)
class Rate:
    """What a device computes, and its price.

    Args:
        tflops: its peak in TFLOP/s; None: as known for the device of the plan.
        utilisation: the share of it that training reaches.
        price: of an hour of one device; None: not asked for.
    """

    tflops: float | None
    utilisation: float
    price: float | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Rate:
        """From the configuration of a run."""
        utilisation = config.get("device_utilisation") or UTILISATION
        return cls(config.get("device_tflops"), utilisation, config.get("price_per_hour"))

    def flops(self, plan: StagePlan) -> float | None:
        """FLOPs a second of one device; None for a CPU, and for a GPU that is not known."""
        place = plan.setup.place
        peak = self.tflops or (TFLOPS if place == "a device" else stated_peak(place))
        return peak * 1e12 * self.utilisation if peak else None


def step_flops(plan: StagePlan) -> float:
    """FLOPs of a step on one device, with what is computed again."""
    measured, batch = plan.measured, plan.batch
    training = {name: curve(batch) for name, curve in measured.training.items()}
    forward = {name: curve(batch) for name, curve in measured.forward.items()}
    full = plan.settings.activation_checkpointing
    trained = (name for name, whole in training.items() if whole > forward.get(name, 0.0))
    again = sum(forward.get(name, 0.0) for name in trained if full.get(name) == "full")
    if measured.cached:
        again += sum(forward.values()) * max(0.0, 1 - measured.cached / batch)
    return (sum(training.values()) + again) * plan.accumulate / plan.setup.tensor_parallel_size


def counted_flops(settings: StageSettings, build: Build) -> float | None:
    """`step_flops` of a stage as its configuration describes it; None where it cannot be measured on
    the meta device. What this process trains with stays as it is."""
    with keep_backend(), single_process(), torch.random.fork_rng(devices=[]):
        choose_backend("math" if requested_backend() == "math" else "sdpa")  # all others compute the same
        try:
            return step_flops(stage_plan(settings, build))
        except (RuntimeError, TypeError, ValueError):  # for the reason: plan=true
            return None


def cost_of(plan: StagePlan, rate: Rate) -> str:
    """Seconds of a step, hours of a stage, and money."""
    flops = rate.flops(plan)
    if flops is None:
        return UNKNOWN
    seconds, steps, devices = step_flops(plan) / flops, plan.settings.max_steps, plan.setup.devices
    peak = flops / rate.utilisation / 1e12
    share = f"{rate.utilisation:g} of {peak:,.4g} TFLOP/s a device"
    why = f"an estimate: {share}, batches at their largest"
    # of a length in passes over data a plan knows no steps
    counted = steps or 1000
    hours = seconds * counted / 3600
    told = f"{counted:,} steps of {_number(seconds)} s: {_number(hours)} hours"
    told += f", {_number(hours * devices)} of one device" if devices > 1 else ""
    told += f", for {hours * devices * rate.price:,.2f}" if rate.price else ""
    return f"{told} ({why})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
