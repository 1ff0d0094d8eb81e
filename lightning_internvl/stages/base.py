"""What all stages share: the weighted sum of their losses, the optimizer over everything they will
ever train, exact resume."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_internvl.data.gradient_accumulation import WINDOW_COUNTS, window_shares
from lightning_internvl.distributed.collectives import data_parallel_rank_and_size
from lightning_internvl.distributed.gradients import clip, clip_in_step, clips_in_step, gradients_of, total_norm
from lightning_internvl.layers.peft import plain_name
from lightning_internvl.model.feature_cache import features
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.stages.roles import model_roles

Batch = dict[str, Any]


class BaseWeights(NamedTuple):
    """Where the weights lie that a stage took over and leaves as they are.

    Attributes:
        place: a run's hand-off, an official checkpoint, or a hub id.
        names: the tensors that are the same there.
        fingerprint: of these weights (see
            `lightning_internvl.checkpoints.weight_source.fingerprint`).
        parts: place and fingerprint of those that the checkpoint only names, by part.
    """

    place: str
    names: frozenset[str]
    fingerprint: str
    parts: Mapping[str, Mapping[str, str]] = {}


class Stage(L.LightningModule):
    """One alignment stage. Subclasses say which losses a batch gives; everything else is common.

    Args:
        model: the composed parts; the objectives of the stage are in `model.objectives`.
        name: the stage's name in the pipeline; its files carry it.
        run_dir: the run's folder.
        parts: resolved configuration of the parts, kept with the hand-off.
        train: rules of the freezing schedule (see `lightning_internvl.stages.freezing`).
        optimizer: called with (model, plan).
        scheduler: called with (optimizer, total_steps=max_steps).
        max_steps: optimizer steps of the stage.
        weights: weight of each loss; those left out count 1.
        seed: with the stage's name and the step it fixes all random draws, so that resume repeats
            them.
        start_step: the step of the checkpoint that is resumed, else 0.
    """

    objectives: tuple[str, ...] = ()
    swaps_a_part = False  # whether a part is another one than where the stage starts

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
            present = list(model.objectives)
            raise ValueError(f"stage {name} needs the objectives {missing}; present: {present}")
        self.model, self.plan = model, FreezePlan(train, parts.get("peft"), model_roles(model))
        self.plan.check(model)
        self.plan.check_moves(model, max_steps, name)
        self.optimizer, self.scheduler, self.max_steps = optimizer, scheduler, max_steps
        self.weights, self.seed, self.start_step = dict(weights or {}), seed, start_step
        # what checkpoints leave out, and with adapters hand-offs too
        self.source: BaseWeights | None = None
        self.base: BaseWeights | None = None
        # With adapters or quantised weights files hold what trains; the rest is read again where it
        # came from.
        self.light = any(any((parts.get(kind) or {}).values()) for kind in ("peft", "quantization"))
        self.strict_loading = not self.light
        self.assumed_step: int | None = None
        self.step_losses: dict[str, Tensor] = {}  # of the micro-batches so far, where a step is logged
        self.watched: dict[str, Tensor] = {}  # what `losses` has found beside them, which is logged too
        self.norm: Tensor | None = None  # of the gradients of the step at work, once it was asked for
        self.measured: dict[str, float] = {}  # of metrics.json, what the stage finds beside its tasks
        # of an earlier step whose weights the stage has taken back at its end
        self.weights_step: int | None = None

    @property
    def global_step(self) -> int:
        """The trainer's count of optimizer steps, or `assumed_step` (plan=true has no trainer)."""
        return super().global_step if self.assumed_step is None else self.assumed_step

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

    def features(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        """What the encoder gives for the batch's pictures, from the feature cache where there is
        one: (N, P, D), one a layer."""
        return features(self.model, batch["pixel_values"], layers, batch)

    def counts(self, batch: Batch) -> dict[str, float]:
        """What losses of this rank's batch, as the data gives it, are means over, by name: labelled
        tokens, judged pairs.

        With `accumulate_grad_batches` these losses are means over all items of a step's
        micro-batches on all ranks (see `lightning_internvl.data.gradient_accumulation`). A loss
        that is not named counts equally in each micro-batch, as a contrast does, which compares the
        pairs of one micro-batch: accumulation does not give it more to compare with, `cached_chunk`
        does.
        """
        return {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, length = self.losses(batch), self.trainer.accumulate_grad_batches
        place, last = batch_idx % length, True
        if length > 1:
            if WINDOW_COUNTS not in batch:
                needs = "batches that know their window; wrap them in AccumulationWindows"
                raise ValueError(f"accumulate_grad_batches={length} needs {needs}")
            shares, equal = window_shares(batch[WINDOW_COUNTS], place, length, self.device)
            last = place + 1 == len(batch[WINDOW_COUNTS])
            losses = {name: shares.get(name, equal) * value for name, value in losses.items()}
        if not any(self.weights.get(name, 1.0) for name in losses):
            fault = f"stages.{self.name}.module.weights counts no loss ({', '.join(losses)}: 0), so that nothing is learnt"
            raise ValueError(f"{fault}; give one of them a weight above 0")
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # of a connector
        # what no logger would take is not collected
        if every and (self.global_step + 1) % every == 0:
            earlier = self.step_losses if place else {}
            found = {**losses, **self.watched}
            self.step_losses = {name: earlier.get(name, 0.0) + value.detach() / length for name, value in found.items()}
            if last:
                self._log_step()
        return self.weighted_sum(losses)

    def _log_step(self) -> None:
        """Log the losses of a step, of all its micro-batches, and the learning rate."""
        found = {f"train/{name}": value for name, value in self.step_losses.items()}
        found["train/loss"] = self.weighted_sum({name: x for name, x in self.step_losses.items() if name not in self.watched})
        # the mean over ranks is the loss of the whole batch
        self.log_dict(found, sync_dist=True)
        # of what learns fastest: a part may have a rate of its own
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        self.log("lr", max(float(group["lr"]) for group in groups))

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The loss that a step lowers."""
        terms = [self.weights.get(name, 1.0) * value for name, value in losses.items()]
        return sum(terms[1:], terms[0])

    def use(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that uses the model otherwise than `losses` does. Where weights are
        divided among processes, they are gathered for it, and all processes must call it."""
        return function(*arguments)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout; the modes are as before afterwards."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    @property
    def is_sharded(self) -> bool:
        """Whether weights are divided among processes, so that all of them must take part in
        whatever uses the model."""
        return isinstance(self, FSDPModule)

    def configure_model(self) -> None:
        """Divide the loaded weights, with a strategy that does so, under the freezing schedule."""
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is not None:
            shard(self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # All draws of a step (drop path, masking, negatives) depend on the step alone, not on what
        # ran before it.
        share, _ = data_parallel_rank_and_size(self.trainer)
        seed = zlib.crc32(f"{self.seed}/{self.name}/{batch_idx}/{share}".encode())
        # what seeds all devices writes down the stack for each that has not been used, which takes
        # longer than all else between two steps
        seed_all = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        seed_all(seed)
        # an objective that holds its scale below a limit has only reached the gathered copy
        if self.is_sharded:
            for objective in self.model.objectives.values():
                if hasattr(objective, "max_log_scale"):
                    objective.logit_scale.data.to_local().clamp_(max=objective.max_log_scale)

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """The norm of all gradients of the step at work, a scalar on the stage's device; it is found
        once, for all who ask. Where weights are divided all processes must ask."""
        if self.norm is None:
            self.norm = total_norm(gradients_of(optimizer)).to(self.device)
        return self.norm

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As the trainer would, but by the norm that the guard has found already."""
        if gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            grads, norm = gradients_of(optimizer), self.gradient_norm(optimizer)
            if clips_in_step(optimizer, grads):
                clip_in_step(optimizer, gradient_clip_val, norm)
            else:
                clip(grads, gradient_clip_val, norm)
        self.norm = None

    def start_tensors(
        self, tensors: Mapping[str, Tensor], read: Callable[[str], Mapping[str, Tensor]]
    ) -> tuple[Mapping[str, Tensor], set[str]]:
        """What the stage's model takes of the weights that it starts from, by name, and the names that
        it has from elsewhere; here all, and none.

        Args:
            read: gives the weights of another place.
        """
        return tensors, set()

    def trained_names(self) -> set[str]:
        """The tensors that the stage will ever train, by the names that files use."""
        names = (name for name, _ in self.model.named_parameters())
        return {plain_name(name) for name in names if self.plan.ever_trains(name)}

    def take_from(self, source: BaseWeights) -> None:
        """Note where weights lie that this stage leaves as they are, so that they need not be written
        again."""
        self.source, self.strict_loading = source, False
        self.base = source if self.light else None

    def left_out(self) -> set[str]:
        """The names of frozen weights that a checkpoint leaves where they came from."""
        names = self.source.names if self.source else frozenset[str]()
        frozen = {id(p) for name, p in self.model.named_parameters() if name in names}
        places = self.model.named_parameters(remove_duplicate=False)  # of tied ones all
        return {f"model.{name}" for name, p in places if id(p) in frozen}

    def checkpoint_tensors(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of the stage's state."""
        if not self.light:
            left = self.left_out()
            return {name: tensor for name, tensor in state.items() if name not in left}
        kept = {f"model.{name}" for name in self.trained_names()}
        return {name: tensor for name, tensor in state.items() if name in kept}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.checkpoint_tensors(checkpoint["state_dict"])
        if self.source and (self.light or self.left_out()):
            checkpoint["source"] = self.source.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wanted = self.checkpoint_tensors(self.state_dict()).keys()
        if not self.strict_loading and wanted != checkpoint["state_dict"].keys():
            other = f"other tensors than stage {self.name} writes"
            raise ValueError(f"{self.checkpoint} holds {other}; start it again")
        if "optimizer_states" in checkpoint:  # divided ones come by another way
            checkpoint["optimizer_states"] = [with_names_of_code(one) for one in checkpoint["optimizer_states"]]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(self.model, self.plan)
        scheduler = self.scheduler(optimizer, total_steps=self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def with_names_of_code(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer as it was loaded, with the very names that code gives to new state. A
    file holds a name once where it is one object, so that a parameter with its first state behind a
    resume would else make other bytes of the same values."""
    states = optimizer["state"].items()
    return {**optimizer, "state": {key: {sys.intern(name): value for name, value in one.items()} for key, one in states}}
