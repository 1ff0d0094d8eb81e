"""What one stage needs: parameters, memory and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_internvl.config.stage_settings import PartsSettings, StageSettings
from lightning_internvl.inference.collators import make_view
from lightning_internvl.model.compose import Build, compose_model
from lightning_internvl.plan.kernels import Unfilled
from lightning_internvl.plan.measure import Blank, Measured, MetaStage, precision_of
from lightning_internvl.plan.memory import Fixed, Memory, Setup, device_memory, fixed_memory, largest_batch, setup_of
from lightning_internvl.plan.tokens import without_words
from lightning_internvl.stages import Stage
from lightning_internvl.training.assembly import build_stage


@dataclass
class StagePlan:
    """A stage and what it needs at its most expensive step."""

    settings: StageSettings
    stage: Stage
    meta_stage: MetaStage
    blank: Callable[[int | None], Blank]
    setup: Setup
    precision: str
    step: int
    fixed: Fixed
    measured: Measured

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.settings.name

    @property
    def batch(self) -> int:
        """Samples of a micro-batch on one device."""
        return self.settings.batch_size

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step."""
        return self.settings.trainer.accumulate_grad_batches

    def memory(self, batch: int | None = None, **change: Any) -> Memory:
        """The memory of one device, for another micro-batch or a changed setup."""
        return device_memory(self.fixed, self.measured, replace(self.setup, **change), batch or self.batch)

    def fits(self, memory: Memory) -> bool:
        """Whether it fits on a device."""
        return memory.total <= self.setup.capacity

    def largest(self, **change: Any) -> int:
        """The largest micro-batch that fits; 0 if none does."""
        return largest_batch(lambda batch: self.fits(self.memory(batch, **change)))

    def changed(
        self,
        *,
        precision: str | None = None,
        frozen: str | None = None,
        image_size: int | None = None,
        recompute: str | None = None,
    ) -> StagePlan:
        """The same stage in another precision, with one part frozen, with smaller pictures, or with
        all blocks computed again. It stays in the first two."""
        precision = precision or self.precision
        blank = self.blank(image_size) if image_size else None
        linear, kinds = self.measured.linear, self.meta_stage.units.recompute
        self.meta_stage.units.recompute = dict.fromkeys(kinds, recompute) if recompute else kinds
        measured = self.meta_stage.measure(precision, self.step, frozen=frozen, blank=blank, kept_only=True, linear=linear)
        self.meta_stage.units.recompute = kinds
        return replace(self, precision=precision, measured=measured, fixed=fixed_memory(self.stage, precision, frozen))


def stage_plans(stages: Iterable[StageSettings], build: Build) -> Iterator[StagePlan]:
    """The plans of stages, in their order."""
    for settings in stages:
        try:
            yield stage_plan(settings, build)
        except (ValueError, TypeError) as error:
            raise ValueError(f"stages.{settings.name}: {error}") from error


def stage_plan(settings: StageSettings, build: Build) -> StagePlan:
    """Build one stage on the meta device and measure it at each step where its state may change."""
    precision = precision_of(settings.trainer.precision)
    setup = setup_of(settings.strategy, settings.trainer, settings.device_memory)
    with torch.device("meta"), Unfilled():
        model, tokenizers = compose_model(_without_words(settings.parts).config, build)
        stage = build_stage(settings, model, Path(), build)

    def blank(image_size: int | None = None) -> Blank:
        return make_view(_resized(settings, image_size) if image_size else settings, model, tokenizers, build).training.blank

    meta_stage = MetaStage(stage, blank(), setup.devices // setup.tensor_parallel_size, settings.activation_checkpointing)
    # of a length in epochs the plan reads no data
    last = settings.max_steps - 1 if settings.max_steps else max(stage.plan.changes())
    plans = []
    for step in sorted({min(step, last) for step in stage.plan.changes()[1:]} | {last}):
        measured = meta_stage.measure(precision, step)
        fixed = fixed_memory(stage, precision)
        plans.append(StagePlan(settings, stage, meta_stage, blank, setup, precision, step, fixed, measured))
    plan = max(plans, key=lambda plan: plan.memory().total)
    meta_stage.prepare(precision, plan.step)
    return plan


def _without_words(parts: PartsSettings) -> PartsSettings:
    """Parts with stand-ins for their tokenizers."""
    decoder = parts.decoder and without_words(parts.decoder)
    return replace(parts, middleware=without_words(parts.middleware), decoder=decoder)


def _resized(settings: StageSettings, image_size: int) -> StageSettings:
    """The settings of a stage with pictures of another side."""
    data, collate = settings.data, settings.collate
    data = replace(data, processor={**data.processor, "image_size": image_size})
    if collate.get("processor"):
        collate = {**collate, "processor": {**collate["processor"], "image_size": image_size}}
    return replace(settings, data=data, collate=collate)
