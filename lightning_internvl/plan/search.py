"""Looks for the cheapest settings with which a stage fits and computes the same numbers.

Tried together are weights divided among the devices, recomputation by part, micro-batches with
accumulation where a loss judges each sample for itself, pairs embedded some at a time (GradCache)
where a contrastive stage can, chunks of a contrast, and more devices at the same global batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lightning_internvl.choices import PARTS
from lightning_internvl.objectives import Classification, NextToken
from lightning_internvl.plan.measure import Curve, Measured
from lightning_internvl.plan.memory import Memory, device_memory
from lightning_internvl.plan.meter import ACTIVATIONS, LOGITS
from lightning_internvl.plan.stage_plan import StagePlan
from lightning_internvl.protocols import HasShardingUnits

ROOM = 0.92  # of a device at most: what a plan does not count needs the rest
KINDS = (None, "selective", "full")  # of recomputation, from the fastest on
# Stated shares of the work of a step, beside what is counted: recomputation of what is cheap,
# weights that are gathered for each block, and once more for each further micro-batch.
SELECTIVE, GATHERED, MICRO_BATCH, CHUNKED = 0.05, 0.03, 0.002, 0.01
MOST_DEVICES = 4096
NOTHING = Curve((0, 0, 0))


@dataclass(frozen=True)
class Choice:
    """Settings of a stage.

    Args:
        kinds: recomputation by part, of parts with blocks.
        batch: samples of a micro-batch on one device.
        cached: samples that are embedded at a time (GradCache); None: all.
        chunk: rows that a contrast compares at a time; None: as it is.
        more: as many times the devices of the stage.
    """

    sharded: bool
    kinds: Mapping[str, str | None]
    batch: int
    accumulate: int
    cached: int | None
    chunk: int | None = None
    more: int = 1


@dataclass(frozen=True)
class Found:
    """A choice, the memory of one device with it, and its work by that of the stage as it is."""

    choice: Choice
    memory: Memory
    work: float


class Search:
    """All choices of one stage; blocks are measured once for each kind of recomputation."""

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan
        set_now = plan.settings.activation_checkpointing
        self.now = {name: set_now.get(name) or None for name in self._parts()}
        weakest = min((KINDS.index(now) for now in self.now.values()), default=len(KINDS))
        kinds = KINDS[weakest + 1 :]
        self.measured = {kind: plan.changed(recompute=kind).measured for kind in kinds}

    def _parts(self) -> Iterator[str]:
        """Parts with blocks that keep something for a backward pass."""
        kept = self.plan.measured.kept[ACTIVATIONS]
        for name in PARTS:
            has_blocks = isinstance(getattr(self.plan.stage.model, name), HasShardingUnits)
            if has_blocks and kept.get(name, NOTHING)(2) > 0:
                yield name

    @property
    def alone(self) -> bool:
        """Whether each sample is judged for itself, so that micro-batches change no gradient."""
        objectives = self.plan.stage.model.objectives.values()
        return all(isinstance(one, NextToken | Classification) or getattr(one, "alone", False) for one in objectives)

    def cheapest(self, more: int = 1) -> Found | None:
        """The choice of least work that fits on `more` times the devices; None if none does."""
        found, room = map(self.found, self._choices(more)), ROOM * self.plan.setup.capacity
        fitting = (one for one in found if one.memory.total <= room)
        return min(fitting, key=lambda one: one.work, default=None)

    def cheapest_on_more(self) -> Found | None:
        """The same on as few devices more as there must be."""
        most = MOST_DEVICES // self.plan.setup.devices
        times = (2**i for i in range(1, most.bit_length()))
        return next(filter(None, map(self.cheapest, times)), None)

    def _choices(self, more: int) -> Iterator[Choice]:
        plan, devices = self.plan, self.plan.setup.devices * more
        shards = (True,) if plan.setup.sharded else (False, True) if devices > 1 else (False,)
        kinds = [KINDS[KINDS.index(now) :] for now in self.now.values()]
        for batch, accumulate in self._batches(more):
            settings = itertools.product(self._cached(batch), self._chunks(batch), shards)
            by_parts = [dict(zip(self.now, own, strict=True)) for own in itertools.product(*kinds)]
            for (cached, chunk, sharded), by_part in itertools.product(settings, by_parts):
                yield Choice(sharded, by_part, batch, accumulate, cached, chunk, more)

    def _batches(self, more: int) -> Iterator[tuple[int, int]]:
        """Micro-batches and their numbers that make the same step."""
        batch, accumulate = self.plan.batch, self.plan.accumulate
        if not self.alone:  # a contrast compares those of one micro-batch
            yield from [(batch // more, accumulate)] if batch % more == 0 else []
            return
        samples = batch * accumulate
        for size in range(1, batch + 1):
            if samples % (size * more) == 0:
                yield size, samples // (size * more)

    def _cached(self, batch: int) -> list[int | None]:
        now = self.plan.measured.cached
        if not hasattr(self.plan.stage, "cached_chunk"):
            return [None]
        halves = [2**i for i in range(batch.bit_length()) if 2**i < (now or batch)]
        return [now, *halves]

    def _chunks(self, batch: int) -> list[int | None]:
        return [None, max(1, batch // 8)] if unchunked(self.plan) and batch > 1 else [None]

    def found(self, choice: Choice) -> Found:
        """What a choice needs and costs."""
        plan, devices = self.plan, self.plan.setup.devices * choice.more
        bucketed = plan.setup.bucketed and not choice.sharded
        setup = replace(plan.setup, sharded=choice.sharded, bucketed=bucketed, devices=devices)
        memory = device_memory(plan.fixed, self._measured(choice), setup, choice.batch)
        return Found(choice, memory, self._work(choice) / self._work(self.unchanged()))

    def unchanged(self) -> Choice:
        """The stage as it is."""
        plan, cached = self.plan, self.plan.measured.cached
        return Choice(plan.setup.sharded, self.now, plan.batch, plan.accumulate, cached)

    def _measured(self, choice: Choice) -> Measured:
        """Each part as it is recomputed; a contrast grows with the devices."""
        now, kept = self.plan.measured, {}
        for what, curves in now.kept.items():
            kept[what] = dict(curves)
            for name, kind in choice.kinds.items():
                source = now if kind == self.now[name] else self.measured[kind]
                kept[what][name] = source.kept[what].get(name, NOTHING)
        if choice.more > 1 and not self.alone:
            logits = kept[LOGITS].items()
            kept[LOGITS] = {name: _times(curve, choice.more) for name, curve in logits}
        chunks = {f"objectives.{name}": choice.chunk for name in unchunked(self.plan) if choice.chunk}
        return replace(now, kept=kept, cached=choice.cached, chunks=now.chunks | chunks)

    def _work(self, choice: Choice) -> float:
        """FLOPs of a micro-batch of the stage, and what is stated for the rest."""
        measured, batch = self.plan.measured, self.plan.batch
        total = sum(curve(batch) for curve in measured.training.values())
        forward = {name: curve(batch) for name, curve in measured.forward.items()}
        again = {None: 0.0, "selective": SELECTIVE, "full": 1.0}
        twice = (forward.get(name, 0.0) * again[kind] for name, kind in choice.kinds.items())
        work = total + sum(twice)
        if choice.cached:
            work += sum(forward.values()) * (1 - min(1.0, choice.cached / choice.batch))
        shares = MICRO_BATCH * choice.accumulate * (2 if choice.sharded else 1)
        shares += (GATHERED if choice.sharded else 0.0) + (CHUNKED if choice.chunk else 0.0)
        return work + total * shares


def unchunked(plan: StagePlan) -> list[str]:
    """Losses that could work in chunks and do not."""
    objectives = plan.stage.model.objectives.items()
    return [name for name, one in objectives if getattr(one, "chunk", 0) is None]


def _times(curve: Curve, factor: float) -> Curve:
    x, y, z = curve.values
    return Curve((x * factor, y * factor, z * factor))


def words_of(plan: StagePlan, choice: Choice) -> list[str]:
    """The words of a command line that make a choice of a stage as it is; quoted for a shell."""
    stage, recomputed = f"stages.{plan.name}", plan.settings.activation_checkpointing
    words = ["strategy=fsdp2"] if choice.sharded and not plan.setup.sharded else []
    if any(kind != (recomputed.get(name) or None) for name, kind in choice.kinds.items()):
        words.append(_recomputed(stage, choice.kinds))
    if choice.batch != plan.batch:
        words.append(f"{stage}.batch_size={choice.batch}")
    if choice.accumulate != plan.accumulate:
        words.append(f"++{stage}.trainer.accumulate_grad_batches={choice.accumulate}")
    if choice.cached != plan.measured.cached:
        words.append(f"++{stage}.module.cached_chunk={choice.cached}")
    for name in unchunked(plan) if choice.chunk else []:
        words.append(f"++{stage}.objectives.{name}.chunk={choice.chunk}")
    return words + _devices(plan, choice.more)


def _recomputed(stage: str, kinds: Mapping[str, str | None]) -> str:
    setting = f"++{stage}.activation_checkpointing"
    if len(set(kinds.values())) == 1:
        return f"{setting}={next(iter(kinds.values()))}"
    given = ",".join(f"{name}:{kind or 'false'}" for name, kind in kinds.items())
    return f"'{setting}={{{given}}}'"


def _devices(plan: StagePlan, more: int) -> list[str]:
    """More devices of one machine up to 8, or more machines."""
    trainer, total = plan.settings.trainer, plan.setup.devices * more
    if more == 1:
        return []
    if trainer.num_nodes == 1 and total <= 8:
        return [f"++stages.{plan.name}.trainer.devices={total}"]
    each = plan.setup.devices // trainer.num_nodes
    each_more = max(each, min(8, total))
    devices = [f"++stages.{plan.name}.trainer.devices={each_more}"] if each_more != each else []
    return [*devices, f"++stages.{plan.name}.trainer.num_nodes={total // each_more}"]
