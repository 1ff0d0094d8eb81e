"""From what was measured to the memory of one device, in bytes."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_internvl.config.stage_settings import TrainerSettings
from lightning_internvl.layers.quantization import quantized_bytes
from lightning_internvl.model.vlm import VLM
from lightning_internvl.plan.measure import PRECISIONS, Measured
from lightning_internvl.plan.meter import ACTIVATIONS, COPIES, LOGITS, OTHER, parts_of
from lightning_internvl.protocols import HasShardingUnits
from lightning_internvl.stages import Stage

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "activations", "logits")
SHARDED = ("fsdp", "FSDP", "deepspeed_stage_3", "ModelParallelStrategy")


@dataclass(frozen=True)
class Setup:
    """Where a stage would run.

    Args:
        sharded: weights, gradients and optimizer state are divided among the devices.
        bucketed: gradients are held a second time, in the buckets in which they are sent.
        capacity: bytes of one device.
        tensor_parallel_size: devices that read the same samples and divide layers.
        place: what the capacity is called.
    """

    name: str
    devices: int
    sharded: bool
    bucketed: bool
    capacity: float
    tensor_parallel_size: int = 1
    place: str = "a device"


def setup_of(strategy: Mapping[str, Any], trainer: TrainerSettings, capacity_gib: float | None) -> Setup:
    """The setup that a configuration asks for.

    Args:
        capacity_gib: memory of one device; None: as much as a device of this machine has.
    """
    devices = _count(trainer.devices) * trainer.num_nodes
    name = str(strategy.get("name") or strategy.get("_target_", "").rpartition(".")[2])
    sharded = bool(strategy.get("shards")) or name.startswith(SHARDED)
    layers = strategy.get("tensor_parallel_size", 1)
    bucketed = devices > 1 and not sharded and not strategy.get("gradient_as_bucket_view")
    layers = layers if isinstance(layers, int) else 1
    capacity, place = (capacity_gib * GIB, "a device") if capacity_gib else _capacity(trainer, devices)
    return Setup(name, devices, sharded, bucketed, capacity, layers, place)


def _capacity(trainer: TrainerSettings, devices: int) -> tuple[float, str]:
    """Bytes of a device that the run would have here, and what they are called; of one with 80 GiB
    where it asks for devices that this machine has not."""
    on_cpu = trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if not on_cpu and devices <= torch.cuda.device_count():
        return torch.cuda.get_device_properties(0).total_memory, f"of an {torch.cuda.get_device_name(0)}"
    if on_cpu and devices == 1 and trainer.accelerator in ("auto", "cpu"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "of this machine's RAM"
    return 80 * GIB, "a device"


def _count(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    return int(devices)


@dataclass
class Fixed:
    """What does not depend on the batch, by part, before any sharding; the largest pieces that are
    gathered whole; and the parts whose weights are not divided."""

    weights: Counter[str] = field(default_factory=Counter)
    gradients: Counter[str] = field(default_factory=Counter)
    optimizer: Counter[str] = field(default_factory=Counter)
    gathered: int = 0
    whole: set[str] = field(default_factory=set)


def fixed_memory(stage: Stage, precision: str, frozen: str | None = None) -> Fixed:
    """Weights, gradients and optimizer state of a stage as it is (see `MetaStage.prepare`)."""
    found, states = Fixed(), optimizer_bytes(stage)
    methods = stage.parts.get("quantization") or {}
    packed = quantized_bytes(stage.model, methods, keep=stage.trained_names())
    found.whole = {name for name, method in methods.items() if method == "int8"}
    for name, part in parts_of(stage.model).items():
        for parameter in part.parameters():
            size = parameter.numel() * parameter.element_size()
            found.weights[name] += packed.get(parameter, size)
            found.gradients[name] += size if parameter.requires_grad else 0
            found.optimizer[name] += 0 if name == frozen else states.get(parameter, 0)
        found.weights[name] += sum(b.numel() * b.element_size() for b in part.buffers())
    dtype, autocast = PRECISIONS[precision]
    there = {p: 0 for name in found.whole for p in stage.model.get_submodule(name).parameters() if p in packed}
    found.gathered = gathered_bytes(stage.model, (autocast or dtype).itemsize, packed | there)
    return found


def optimizer_bytes(stage: Stage) -> dict[nn.Parameter, int]:
    """Bytes of the optimizer's state for each parameter: one step on the meta device for one
    parameter of each shape."""
    optimizer: Optimizer = stage.configure_optimizers()["optimizer"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first = {(tuple(p.shape), p.dtype): p for p in reversed(parameters)}
    kept = set(map(id, first.values()))
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in kept]
        group["fused"] = group["foreach"] = False
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    sizes = {
        shape: sum(x.numel() * x.element_size() for x in optimizer.state[p].values() if torch.is_tensor(x) and x.ndim)
        for shape, p in first.items()
    }
    return {p: sizes[tuple(p.shape), p.dtype] for p in parameters}


def gathered_bytes(model: VLM, element: int, packed: Mapping[nn.Parameter, int]) -> int:
    """What stands unsharded at the worst moment: everything outside the sharding units, the largest
    of these, and the weights of the next one; in the type that is computed with, or packed, and with
    gradients of what trains."""

    def size(parameters: Iterable[nn.Parameter], *, gradients: bool = True) -> int:
        sizes = ((p, packed.get(p, p.numel() * element)) for p in parameters)
        return sum(own * (2 if gradients and p.requires_grad else 1) for p, own in sizes)

    largest, inside = 0, set[nn.Parameter]()
    for part in parts_of(model).values():
        for unit in part.sharding_units() if isinstance(part, HasShardingUnits) else []:
            own = list(unit.parameters())
            inside.update(own)
            largest = max(largest, size(own) + size(own, gradients=False))
    return largest + size(p for p in model.parameters() if p not in inside)


@dataclass(frozen=True)
class Memory:
    """Bytes by kind and part, on one device."""

    parts: dict[str, defaultdict[str, float]]

    @property
    def total(self) -> float:
        """Bytes of everything."""
        return sum(sum(counts.values()) for counts in self.parts.values())


def device_memory(fixed: Fixed, measured: Measured, setup: Setup, batch: int) -> Memory:
    """The memory of one device for a micro-batch of `batch` samples."""
    share = setup.devices if setup.sharded else 1
    parts = {kind: defaultdict[str, float](float) for kind in KINDS}
    for kind, counts in (("weights", fixed.weights), ("gradients", fixed.gradients), ("optimizer", fixed.optimizer)):
        twice = 2 if kind == "gradients" and setup.bucketed else 1
        undivided = fixed.whole if kind == "weights" else set()
        parts[kind] |= {name: count * twice / (1 if name in undivided else share) for name, count in counts.items()}
    if share > 1:
        parts["weights"][OTHER] += fixed.gathered
    for name in measured.kept[ACTIVATIONS]:
        parts["activations"][name] += measured.activations(name, batch)
    parts["activations"][OTHER] += measured.inputs(batch)
    for name in measured.kept[LOGITS]:
        # what is kept, and its gradient, which is as large
        parts["logits"][name] += 2 * measured.logits(name, batch)
    if share == 1:  # sharded weights are gathered in the lower type and let go
        for name, curve in measured.kept[COPIES].items():
            parts["weights"][name] += curve(batch)
    return Memory(parts)


def largest_batch(fits: Callable[[int], bool], most: int = 2**20) -> int:
    """The largest number from 0 on for which it fits, given that it fits for all smaller ones."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
