"""What training steps compute, in FLOPs by part, and what share of a device's peak that is (MFU).

A stage is built once more on the meta device and measured there at three lengths of text, once for
each state of freezing. What trains then costs 6 FLOPs a parameter and token, what is frozen on the
way of a gradient 4, what is frozen and detached 2, and attention comes on top (a multiply-add
counts as two). Through the three points goes, for each part,

    FLOPs = a x squares + b x tokens + c x (sum of squared lengths) + d x labelled tokens

of which a real batch gives the quantities without padding: tiles (or patches, where pictures are no
squares), tokens, the squared length of each sample (in a packed row each for itself), and the
tokens that a language model's head judges. Texts of several kinds in a batch count together, as if
they shared it like its longest rows do. Not counted: losses, norms and other work without matrix
products, and what is computed a second time.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX, PARTS
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.data.collate.embedding import batches_of, with_batches
from lightning_internvl.distributed.collectives import single_process
from lightning_internvl.layers.attention import choose_backend, keep_backend, requested_backend
from lightning_internvl.model.compose import Build, compose_model
from lightning_internvl.objectives import NextToken
from lightning_internvl.plan.kernels import Unfilled
from lightning_internvl.plan.measure import SAMPLES, Blank, MetaStage
from lightning_internvl.stages import Stage
from lightning_internvl.training.assembly import build_stage

LENGTHS = (1.0, 0.75, 0.5)  # shares of the longest rows that are measured
Head = Callable[[Tensor], Tensor]  # states (T, H) to logits (T, V)
PIXELS = ("pixel_values", "pixel_values_videos")
# Dense bf16 matrix products with float32 sums, as the makers state them, in TFLOP/s; the first name
# that fits counts.
PEAKS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


class Amount(NamedTuple):
    """What a batch holds, without padding: numbers, or tensors still on the device."""

    squares: Any = 0
    tokens: Any = 0
    squared: Any = 0
    labelled: Any = 0

    def plus(self, other: Amount) -> Amount:
        """The sum."""
        return Amount(*(a + b for a, b in zip(self, other, strict=True)))


def amount_of(batch: Mapping[str, Any]) -> Amount:
    """The quantities of a batch; of packed rows each sample counts for itself."""
    if len(parts := batches_of(batch)) > 1:
        return functools.reduce(Amount.plus, map(amount_of, parts))
    squares = sum(len(batch[name]) for name in PIXELS if batch.get(name) is not None)
    lengths = [x.sum(dim=-1) for name, x in batch.items() if name.endswith("mask") and isinstance(x, Tensor)]
    squared = sum((x * x).sum() for x in lengths)
    if "segments" in batch:
        squared = sum(length**2 for row in batch["segments"] for length in row)
    labels = [x for name, x in batch.items() if name.endswith("labels") and isinstance(x, Tensor) and x.ndim == 2]
    judged = sum((x != IGNORE_INDEX).sum() for x in labels)
    return Amount(squares, sum(x.sum() for x in lengths), squared, judged)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step by part: for each square, token, squared length and label."""

    rates: dict[str, Amount]

    def of(self, amount: Amount) -> dict[str, float]:
        """FLOPs by part."""
        return {part: sum(a * float(b) for a, b in zip(rate, amount, strict=True)) for part, rate in self.rates.items()}

    def __str__(self) -> str:
        return "; ".join(
            f"{part}: " + " + ".join(f"{rate:.4g} x {name}" for name, rate in rates._asdict().items() if rate)
            for part, rates in self.rates.items()
        )


class HeadRecorder(NextToken):
    """Notes which head would judge which states, instead of calling it: on the meta device all
    tokens count as labelled."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Head, Tensor]] = []

    def total_loss(self, states_TH: Tensor, targets_T: Tensor, head: Head, weights_T: Tensor | None = None) -> Tensor:
        """The states' sum, so that there is a gradient."""
        self.calls.append((head, states_TH))
        return states_TH.sum()

    def token_losses(self, states_TH: Tensor, targets_T: Tensor, head: Head) -> Tensor:
        """The sum of each state."""
        self.calls.append((head, states_TH))
        return states_TH.sum(dim=-1)


def flops_of(stage: Stage, blank: Blank, step: int = 0) -> Flops:
    """Measure a stage on the meta device in its state at a step. The stage is changed and serves
    nothing else afterwards."""
    objectives = stage.model.objectives
    writers = [name for name, one in objectives.items() if isinstance(one, NextToken)]
    recorders = {name: HeadRecorder() for name in writers}
    objectives.update(recorders)
    meta_stage = MetaStage(stage, blank)
    meta_stage.prepare("32-true", step)
    rows, counts = [], []
    for share in LENGTHS:
        batch = shorten_texts(blank(SAMPLES[0], "cpu"), share)  # whose tokens are counted
        rows.append([float(x) for x in amount_of(batch)[:3]])
        for recorder in recorders.values():
            recorder.calls.clear()
        tally, _ = meta_stage.run(batch)
        counts.append(tally.forward + tally.backward)
    calls = [call for recorder in recorders.values() for call in recorder.calls]
    of_heads = sum((_head_flops(meta_stage, *call) for call in calls), Counter())
    sizes = np.array(rows)
    scale = np.maximum(sizes.max(axis=0), 1)
    rates = {}
    for part in PARTS:
        found = np.linalg.lstsq(sizes / scale, np.array([float(count[part]) for count in counts]), rcond=1e-9)[0] / scale
        # but for rounding
        found[np.abs(found * scale) < 1e-6 * np.abs(found * scale).max(initial=1.0)] = 0.0
        if getattr(stage.model, part) is not None:
            squares, tokens, squared = found.tolist()
            rates[part] = Amount(squares, tokens, squared, of_heads[part])
    return Flops(rates)


def shorten_texts(batch: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A batch whose rows of text are cut at a share of their length."""
    texts = ("ids", "mask", "labels")

    def shorten(rows: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: x[:, : round(x.shape[1] * share)] if isinstance(x, Tensor) and x.ndim == 2 and name.endswith(texts) else x
            for name, x in rows.items()
        }

    return with_batches(batch, shorten)


def _head_flops(meta_stage: MetaStage, head: Head, states_TH: Tensor) -> Counter[str]:
    """FLOPs of a head for one token, by the part that it belongs to."""
    meter, tokens = meta_stage.meter, len(states_TH)
    states = torch.empty_like(states_TH).requires_grad_(states_TH.requires_grad)
    with torch.device("meta"), meter.scope() as tally, meter:
        logits = head(states)
        if logits.requires_grad:
            meter.backward(logits.sum().backward)
    ((part, _),) = tally.forward.items()
    return Counter({part: (tally.forward.total() + tally.backward.total()) / tokens})


class NotMeasurableError(RuntimeError):
    """A part needs the values of tensors, of which the meta device has none."""


def measure_flops(settings: StageSettings, blank: Blank, build: Build, step: int) -> Flops:
    """The FLOPs of a stage as its configuration describes it, of one process.

    Raises:
        NotMeasurableError: for parts that do not run on the meta device.
    """
    with keep_backend(), single_process(), torch.random.fork_rng(devices=[]):
        # all others compute the same
        choose_backend("math" if requested_backend() == "math" else "sdpa")
        try:
            with torch.device("meta"), Unfilled():
                model, _ = compose_model(settings.parts.config, build)
                stage = build_stage(settings, model, Path(), build)
            return flops_of(stage, blank, step)
        except (RuntimeError, TypeError, ValueError) as error:
            # PyTorch raises RuntimeError for an operation that needs values; NumPy and Triton name
            # the device.
            told = "meta" in str(error) or "Triton" in str(error)
            if told or isinstance(error, RuntimeError):
                raise NotMeasurableError(str(error)) from error
            raise


def stated_peak(name: str) -> float | None:
    """TFLOP/s that the makers state for a device whose name holds a known one; None if none is."""
    peaks = (peak for part, peak in PEAKS.items() if part.lower() in name.lower())
    return next(peaks, None)


def peak_flops(device: torch.device, stated: float | None = None) -> tuple[float | None, str]:
    """FLOPs a second that a device can do at most, and where the number comes from.

    Args:
        stated: TFLOP/s, as the user gives them.
    """
    if stated:
        return stated * 1e12, "callbacks.throughput.peak_tflops"
    if device.type != "cuda":
        return None, "of a CPU no peak is known; callbacks.throughput.peak_tflops=N gives one"
    name = torch.cuda.get_device_name(device)
    if peak := stated_peak(name):
        return peak * 1e12, f"dense bf16, as stated for {name}"
    return None, f"the peak of {name} is not known; callbacks.throughput.peak_tflops=N gives one"
