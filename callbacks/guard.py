"""Watches for numbers that are no longer finite, and says which samples the step had."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_internvl.console import console
from lightning_internvl.distributed.collectives import gather_objects, rank
from lightning_internvl.files import write_json
from lightning_internvl.messages import check_choice, check_number, first_of, without_secrets
from lightning_internvl.stages import Stage

CHOICES = ("stop", "skip")
SHOWN = 64  # samples of a batch that are named


class Watched(NamedTuple):
    """A step that nobody has looked at yet: its samples by micro-batch, and what is not finite:
    each loss, then the gradient."""

    step: int
    keys: list[list[str]]
    flags: Tensor


class Guard(L.Callback):
    """A loss or gradient that is not finite stops the run, or its step is left out, on all ranks.

    Whether numbers are finite is found on the device. On a CPU it is read in each step, on a GPU
    every `every_n_steps` steps and before anything is saved, so that no step waits and a checkpoint
    never holds what such a step has spoilt.

    Args:
        on_nan: stop: end with the checkpoint before; skip: leave the step out (no weight and no
            moment of the optimizer changes) and go on. With an optimizer that is not fused, or with
            divided weights, skip reads in each step on a GPU too.
        limit: so many steps may be left out in a stage; one more stops it.
        every_n_steps: how often a GPU is asked.
    """

    def __init__(self, *, on_nan: str = "stop", limit: int = 10, every_n_steps: int = 20) -> None:
        check_choice("callbacks.guard.on_nan", on_nan, CHOICES)
        for name, value in {"limit": limit, "every_n_steps": every_n_steps}.items():
            check_number(f"callbacks.guard.{name}", value, above=0, whole=True)
        self.on_nan, self.limit, self.every_n_steps = on_nan, limit, every_n_steps
        self.batch: dict[str, Any] = {}  # at work
        # of the micro-batches of a step, and whether their losses are finite
        self.keys: list[list[str]] = []
        self.losses: list[Tensor] = []
        self.waiting: list[Watched] = []
        self.skipped: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped} if self.skipped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Stage, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: Stage, loss: Tensor) -> None:
        self.keys.append([str(key) for key in self.batch["keys"]])
        self.losses.append(~torch.isfinite(loss.detach()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Stage, optimizer: Optimizer) -> None:
        # it leaves out such gradients itself
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradient = self.losses[-1] if scaled else ~torch.isfinite(pl_module.gradient_norm(optimizer))
        flags = torch.stack([*self.losses, gradient]).float()
        self.waiting.append(Watched(trainer.global_step, self.keys, flags))
        self.keys, self.losses = [], []
        if self.on_nan == "skip" and flags.is_cuda and _skips_on_device(optimizer, pl_module):
            found = _over_ranks(flags).max()
            optimizer.found_inf = found  # type: ignore[attr-defined]  # fused optimizers read it
        elif (not flags.is_cuda or self.on_nan == "skip") and self.look(pl_module):
            for parameter in pl_module.parameters():
                parameter.grad = None  # the optimizer passes over weights without a gradient

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch = {}
        if trainer.global_step % self.every_n_steps == 0:
            self.look(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Stage, checkpoint: dict[str, Any]) -> None:
        if self.look(pl_module):  # after the states were collected
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        self.look(pl_module)
        if self.skipped:
            steps = ", ".join(str(one["step"]) for one in self.skipped)
            left_out = f"{len(self.skipped)} steps were left out, their numbers were not finite"
            console.print(f"{pl_module.name}: {left_out}: {steps}")

    def on_exception(self, trainer: L.Trainer, pl_module: Stage, exception: BaseException) -> None:
        """Any error says where it happened: in a traceback, and where it is told in plain words."""
        if self.batch:
            exception.add_note(f"stage {pl_module.name}, step {trainer.global_step}: {described(self.batch)}")

    def look(self, stage: Stage) -> bool:
        """Read what was found since the last look; True if a step was not finite.

        Raises:
            ValueError: naming stage, step and samples, if such a step ends the run.
        """
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return False
        own = torch.cat([one.flags for one in waiting])
        seen = _over_ranks(own)
        if not seen.any():
            return False
        values, everywhere = (x.split([len(one.flags) for one in waiting]) for x in (own, seen))
        steps = zip(waiting, values, everywhere, strict=True)
        found = [self._told(*step) for step in steps if step[2].any()]
        if self.on_nan == "stop":
            raise ValueError(self._message(stage, found[0], "callbacks.guard.on_nan=skip leaves out such steps"))
        self.skipped += found
        for one in found:
            message = f"{one['what']} is not finite, the step is left out"
            console.print(f"{stage.name}, step {one['step']}: {message}", soft_wrap=True)
        if rank() == 0:
            write_json(stage.folder / "not_finite.json", self.skipped)
        if len(self.skipped) > self.limit:
            limit = f"callbacks.guard.limit={self.limit}"
            many = f"{len(self.skipped)} steps were not finite, more than {limit}"
            raise ValueError(self._message(stage, found[-1], many))
        return True

    @staticmethod
    def _told(step: Watched, own: Tensor, everywhere: Tensor) -> dict[str, Any]:
        """A step as it is reported: with the micro-batches whose loss is not finite, else all."""
        of_loss = bool(everywhere[:-1].any())
        flags = own[:-1].tolist()
        mine = [keys for keys, bad in zip(step.keys, flags, strict=True) if bad or not of_loss]
        keys = [key for rank in gather_objects(mine) for micro_batch in rank for key in micro_batch]
        what = "the loss" if of_loss else "the gradient"
        return {"step": step.step, "what": what, "samples": [without_secrets(key) for key in keys]}

    @staticmethod
    def _message(stage: Stage, found: dict[str, Any], advice: str) -> str:
        path = stage.checkpoint
        kept = f"the checkpoint before it is kept ({path})" if path.exists() else "there is no checkpoint before it"
        return (
            f"stage {stage.name}, step {found['step']}: {found['what']} is not finite; {kept}\n"
            f"samples of the step: {first_of(found['samples'], SHOWN)}\n"
            f"start anew with a lower optimizer.lr{_now(stage, 'optimizer', 'lr')}, more scheduler.warmup_steps"
            f"{_now(stage, 'scheduler', 'warmup_steps')} or without these samples; {advice}"
        )


def _now(stage: Stage, group: str, setting: str) -> str:
    """What a setting of the optimizer or the schedule is in this stage, where it is known."""
    value = getattr(getattr(stage, group, None), "keywords", {}).get(setting)
    return "" if value is None else f" (now {value})"


def described(batch: dict[str, Any]) -> str:
    """Sizes of a batch and the ids of its samples."""
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    shapes = ", ".join(f"{name} {' x '.join(map(str, x.shape))}" for name, x in tensors.items())
    return f"a batch of {len(batch['keys'])} samples ({shapes}): {first_of(batch['keys'], SHOWN)}"


def _over_ranks(flags: Tensor) -> Tensor:
    """1 where any process has found something, those of a tensor-parallel group too."""
    if dist.is_available() and dist.is_initialized():
        flags = flags.clone()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags


def _skips_on_device(optimizer: Optimizer, stage: Stage) -> bool:
    """Whether the device alone can leave a step out: fused optimizers read `found_inf`."""
    return bool(optimizer.defaults.get("fused")) and not stage.is_sharded
