"""What all stages share: the weighted sum of their losses, the optimizer over everything they will ever train, exact resume."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_internvl.checkpoints.handoff import Base
from lightning_internvl.freezing import FreezePlan
from lightning_internvl.model import VLM
from lightning_internvl.peft import plain_name

Batch = dict[str, Any]


class Stage(L.LightningModule):
    """One alignment stage. Subclasses say which losses a batch gives; everything else is common.

    Args:
        model: the composed parts; the objectives of the stage are in `model.objectives`.
        name: the stage's name in the pipeline; its files carry it.
        run_dir: the run's folder.
        parts: resolved configuration of the parts, kept with the hand-off.
        train: rules of the freezing schedule (see `lightning_internvl.freezing`).
        optimizer: called with (model, plan).
        scheduler: called with (optimizer, total_steps=max_steps).
        max_steps: optimizer steps of the stage.
        weights: weight of each loss; those left out count 1.
        seed: with the stage's name and the step it fixes all random draws, so that resume repeats them.
        start_step: the step of the checkpoint that is resumed, else 0.
    """

    objectives: tuple[str, ...] = ()

    def __init__(
        self,
        model: VLM,
        *,
        name: str,
        run_dir: Path,
        parts: Mapping[str, Any],
        train: Sequence[str | Mapping[str, Any]],
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler],
        max_steps: int,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.run_dir, self.parts = name, Path(run_dir), parts
        missing = [name for name in self.objectives if name not in model.objectives]
        if missing:
            raise ValueError(f"stage {name} needs the objectives {missing}; present: {list(model.objectives)}")
        self.model, self.plan = model, FreezePlan(train, parts.get("peft"))
        self.plan.check(model)
        self.optimizer, self.scheduler, self.max_steps = optimizer, scheduler, max_steps
        self.weights, self.seed, self.start_step = dict(weights or {}), seed, start_step
        self.base: Base | None = None
        # With adapters or quantised weights files hold what trains; the rest is read again where it came from.
        self.light = any(any((parts.get(kind) or {}).values()) for kind in ("peft", "quantization"))
        self.strict_loading = not self.light

    @property
    def folder(self) -> Path:
        """What the stage writes for the report."""
        return self.run_dir / "stages" / self.name

    @property
    def checkpoint(self) -> Path:
        """The checkpoint from which the stage resumes."""
        return self.run_dir / "checkpoints" / self.name / "last.ckpt"

    @property
    def handoff(self) -> Path:
        """The weights of the finished stage; where this folder exists, the stage is finished."""
        return self.run_dir / "handoff" / self.name

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The stage's losses by name, each a scalar."""
        raise TypeError(f"{type(self).__name__} must say which losses a batch gives")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        loss = sum(self.weights.get(name, 1.0) * value for name, value in losses.items())
        every = self.trainer.log_every_n_steps
        if every and (self.global_step + 1) % every == 0:  # what no logger would take is not collected
            self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()} | {"train/loss": loss.detach()})
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # All draws of a step (drop path, masking, negatives) depend on the step alone, not on what ran before it.
        torch.manual_seed(zlib.crc32(f"{self.seed}/{self.name}/{batch_idx}/{self.global_rank}".encode()))

    def trained_names(self) -> set[str]:
        """The tensors that the stage will ever train, by the names that files use."""
        return {plain_name(name) for name, _ in self.model.named_parameters() if self.plan.ever_trains(name)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.light:
            kept = {f"model.{name}" for name in self.trained_names()}
            checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wanted = {f"model.{name}" for name in self.trained_names()}
        if self.light and wanted != set(checkpoint["state_dict"]):
            raise ValueError(f"{self.checkpoint} holds other tensors than those that stage {self.name} trains; start it again")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer(self.model, self.plan)
        scheduler = self.scheduler(optimizer, total_steps=self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
