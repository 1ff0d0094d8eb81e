"""One stage with its weights and a few of its samples, and what the checks have in common:
gradients, and weights that return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.data.collate.base import Prepared
from lightning_internvl.data.gradient_accumulation import AccumulationWindows
from lightning_internvl.stages import Stage
from lightning_internvl.training.assembly import Assembly

# how far two computations in float32 may differ, relatively; a few 1e-7 and 1e-6 are usual
LOSS, GRADIENT = 1e-5, 1e-4
# of the steps that are tried: those of a warm-up are too small to move a weight of 1 in float32
LEAST_RATE = 1e-3


class Result(NamedTuple):
    """What a check has found; `passed` is None where there is nothing to check."""

    name: str
    passed: bool | None
    detail: str


class Gradients(NamedTuple):
    """A loss and its gradients by name."""

    loss: float
    found: dict[str, Tensor]

    def differ(self, other: Gradients) -> tuple[float, float]:
        """Relative differences of the loss, and of the gradient as one vector, to another's."""
        change = sum(float((self.found[n].double() - x.double()).square().sum()) for n, x in other.found.items())
        size = sum(float(x.double().square().sum()) for x in other.found.values())
        return abs(self.loss - other.loss) / max(abs(other.loss), 1e-12), (change / max(size, 1e-24)) ** 0.5


@dataclass
class Harness:
    """A stage that is ready for a step.

    Attributes:
        samples: a few of the stage's data, prepared; they make two batches of equal size.
        exact: whether losses are computed in float32, whatever the precision of the run.
    """

    settings: StageSettings
    stage: Stage
    collate: Any
    trainer: L.Trainer
    samples: list[Prepared]
    device: torch.device
    exact: bool = False

    @classmethod
    def of(cls, assembly: Assembly, count: int) -> Harness:
        """The harness of an assembled stage that has its weights."""
        settings, stage, data, trainer = assembly
        trainer.log_every_n_steps = 0  # type: ignore[attr-defined]  # nothing is logged
        stage.trainer = trainer
        stage.plan.apply(stage.model, 0)
        device = trainer.strategy.root_device
        return cls(settings, stage.to(device), data.collate, trainer, data.first(count), device)

    @property
    def halves(self) -> tuple[list[Prepared], list[Prepared]]:
        """The samples in two batches that differ in how many of their tokens are labelled."""
        ordered = sorted(self.samples, key=lambda one: sum(int((x >= 0).sum()) for x in labels_of(self.batch([one])).values()))
        return ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]

    def batch(self, samples: Sequence[Prepared] | None = None) -> dict[str, Any]:
        """A batch of prepared samples, all by default."""
        return self.to_device(self.collate.stack(self.samples if samples is None else samples))

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch where the model is."""
        return move_data_to_device(batch, self.device)

    def precision(self) -> AbstractContextManager[Any]:
        """The context that a step of the run computes in. What compares two ways to the same
        numbers needs float32 (see `loud`)."""
        plugin = self.trainer.precision_plugin
        mixed = isinstance(plugin, MixedPrecision) and not self.exact
        return plugin.forward_context() if mixed else nullcontext()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """What a training step of this batch alone would lower; the same draws at every call."""
        torch.manual_seed(self.settings.seed)
        self.trainer.accumulate_grad_batches = 1
        with self.precision():
            return self.stage.training_step(batch, 0)

    def gradients(self, *batches: dict[str, Any]) -> Gradients:
        """Loss and gradients of one step over micro-batches, as the trainer adds them up."""
        self.stage.zero_grad(set_to_none=True)
        total = 0.0
        counted = AccumulationWindows(batches, len(batches), self.stage.counts)
        for place, batch in enumerate(counted if len(batches) > 1 else batches):
            torch.manual_seed(self.settings.seed)
            self.trainer.accumulate_grad_batches = len(batches)
            with self.precision():
                loss = self.stage.training_step(batch, place) / len(batches)
            loss.backward()
            total += loss.item()
        named = self.stage.model.named_parameters()
        return Gradients(total, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named if p.requires_grad})

    def optimizer(self) -> Optimizer:
        """The stage's optimizer, with steps large enough to be seen."""
        optimizer = self.stage.optimizer(self.stage.model, self.stage.plan)
        for group in optimizer.param_groups:
            if group["lr"] > 0:
                group["lr"] = max(float(group["lr"]), LEAST_RATE)
        return optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers."""
        model = self.stage.model
        return {name: x.detach().clone() for name, x in (*model.named_parameters(), *model.named_buffers())}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put copies back, in the type that they have."""
        model = self.stage.model
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if x.dtype != tensors[name].dtype:
                x.data = x.data.to(tensors[name].dtype)
            x.data.copy_(tensors[name])

    @contextmanager
    def keep_state(self) -> Iterator[dict[str, Tensor]]:
        """The stage is as before afterwards; gives the weights as they are now."""
        before, weights = self.tensors(), self.stage.weights
        try:
            yield before
        finally:
            self.restore(before)
            self.stage.weights = weights
            self.stage.zero_grad(set_to_none=True)
            self.stage.train()
            self.stage.plan.apply(self.stage.model, 0)

    @contextmanager
    def with_large_weights(self) -> Iterator[None]:
        """Without dropout, in float32, and with weights so large that every token matters to those
        that see it: fresh ones are so small that a leak would hide in the last digits."""
        with self.keep_state():
            torch.manual_seed(self.settings.seed)
            widen(self.stage.model)
            redraw(self.stage.model)
            self.stage.eval()
            with self.exact_arithmetic():
                yield

    @contextmanager
    def exact_arithmetic(self) -> Iterator[None]:
        """Losses in float32 inside."""
        before, self.exact = self.exact, True
        try:
            yield
        finally:
            self.exact = before


def widen(model: torch.nn.Module) -> None:
    """Let weights of 16 bits take 32: their rounding would hide what is compared."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


@torch.no_grad()
def redraw(model: torch.nn.Module) -> None:
    """Draw all matrices but embeddings anew, so that they keep the size of their inputs."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.is_floating_point() and "embed" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def labels_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The labels of a batch by name: -100 where nothing is to be learnt."""
    return {name: x for name, x in batch.items() if name == "labels" or name.endswith("_labels")}


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return one.shape == two.shape and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (one, two)))
