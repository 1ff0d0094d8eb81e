"""What to change when a stage does not fit, each with the figure that it leads to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lightning_internvl.plan.memory import Memory
from lightning_internvl.plan.meter import parts_of
from lightning_internvl.plan.stage_plan import StagePlan

MOST_DEVICES = 4096
WORTH = 0.97  # what saves less than three hundredths is not told
SMALLER = 0.75  # of the pictures' side


class Advice(NamedTuple):
    """A change, and the memory of one device after it."""

    change: str
    memory: Memory


def advice(plan: StagePlan) -> Iterator[Advice]:
    """Changes that help, those that change least of the training first."""
    now = plan.memory().total
    changes = list(_changes(plan))
    plan.meta_stage.prepare(plan.precision, plan.step)
    yield from (one for one in changes if one.memory.total < WORTH * now)


def _changes(plan: StagePlan) -> Iterator[Advice]:
    yield from _batches(plan, "")
    for kind, price in (("selective", "a little slower"), ("full", "a third slower")):
        memory = plan.changed(recompute=kind).memory()
        yield Advice(f"activation_checkpointing={kind} ({price}, the same numbers)", memory)
    if plan.setup.bucketed:
        yield Advice("+strategy.gradient_as_bucket_view=true (gradients are held once)", plan.memory(bucketed=False))
    yield from _shards(plan)
    if plan.precision != "bf16-true":
        lower = plan.changed(precision="bf16-true")
        yield Advice("trainer.precision=bf16-true (less exact: no float32 copy of the weights)", lower.memory())
        yield from _shards(lower, "trainer.precision=bf16-true, ")
    yield from _resolution(plan)
    plan.meta_stage.prepare(plan.precision, plan.step)
    learnt = {n: (p for p in part.parameters() if p.requires_grad) for n, part in parts_of(plan.stage.model).items()}
    trained = {name: sum(p.numel() for p in own) for name, own in learnt.items()}
    trained = {n: x for n, x in trained.items() if x and not n.startswith("objectives")}
    if len(trained) > 1:
        largest = max(trained, key=trained.__getitem__)
        memory = plan.changed(frozen=largest).memory()
        yield Advice(f"stages.{plan.name}.module.train without {largest}", memory)


def _batches(plan: StagePlan, before: str, **change: bool | int) -> Iterator[Advice]:
    """The largest micro-batch that fits, with as many of them as make up for it."""
    batch = plan.largest(**change)
    if 0 < batch < plan.batch:
        times = -(-plan.batch * plan.accumulate // batch)
        compares = " (a contrast compares fewer pairs)" if "itc" in plan.stage.objectives else ""
        words = f"{before}batch_size={batch}, accumulate_grad_batches={times}{compares}"
        yield Advice(words, plan.memory(batch, **change))


def _shards(plan: StagePlan, before: str = "") -> Iterator[Advice]:
    """Sharding over the devices that there are, or more if one sample is too much."""
    first = plan.setup.devices * (2 if plan.setup.sharded or plan.setup.devices == 1 else 1)
    numbers = [first * 2**i for i in range(12) if first * 2**i <= MOST_DEVICES]
    devices = next((n for n in numbers if plan.largest(sharded=True, bucketed=False, devices=n)), first)
    change = {"sharded": True, "bucketed": False, "devices": devices}
    what = f"{before}weights, gradients and optimizer sharded over {devices:,} devices"
    yield Advice(what, plan.memory(**change))
    yield from _batches(plan, f"{what}, ", **change)


def _resolution(plan: StagePlan) -> Iterator[Advice]:
    encoder = plan.stage.model.encoder
    patch = getattr(encoder, "patch_size", 1)
    # even, for pixel shuffle
    grid = int(plan.settings.parts.encoder.get("image_size", 0) / patch * SMALLER) // 2 * 2
    if not grid:
        return
    try:
        smaller = plan.changed(image_size=grid * patch)
    except ValueError:  # parts that take one size only, as a pair of towers does
        return
    yield Advice(f"encoder.image_size={grid * patch}", smaller.memory())
