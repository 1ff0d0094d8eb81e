"""What to change when a stage does not fit: words of the command line, and what they lead to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from lightning_internvl.plan.memory import Memory
from lightning_internvl.plan.meter import parts_of
from lightning_internvl.plan.search import KINDS, ROOM, Choice, Found, Search, words_of
from lightning_internvl.plan.stage_plan import StagePlan

SAME, OTHER = "the same numbers", "other numbers"
SMALLER = 0.75  # of the pictures' side


class Advice(NamedTuple):
    """Words to add to the command, the memory of one device with them, and what they cost."""

    words: str
    memory: Memory
    price: str


def advice(plan: StagePlan) -> Iterator[Advice]:
    """The cheapest settings that fit: with the same numbers; if there are none on the devices that
    there are, on more of them, and with other numbers. If nothing fits, what needs least."""
    search = Search(plan)
    if here := search.cheapest():
        yield _of(plan, here, SAME)
    else:
        if more := search.cheapest_on_more():
            yield _of(plan, more, f"{SAME}, {plan.setup.devices * more.choice.more:,} devices")
        yield from _other_numbers(plan, search, found=more is not None)
    plan.meta_stage.prepare(plan.precision, plan.step)


def _of(plan: StagePlan, found: Found, price: str) -> Advice:
    work = f", {found.work:.2f} times the work" if found.work > 1.005 else ""
    return Advice(" ".join(words_of(plan, found.choice)), found.memory, price + work)


def _other_numbers(plan: StagePlan, search: Search, *, found: bool) -> Iterator[Advice]:
    """The first change of the training that fits, beside all that changes no number; else all."""
    least, room = search.found(_least(search)), ROOM * plan.setup.capacity
    changes = []
    for one in _changes(plan, search, least.choice):
        if one.memory.total <= room:
            yield one
            return
        changes.append(one)
    if not found:
        yield _of(plan, least, SAME)
        yield from (one for one in changes if one.memory.total < least.memory.total)


def _least(search: Search) -> Choice:
    """What needs least on the devices that there are."""
    now = search.unchanged()
    samples = now.batch * now.accumulate
    batch, accumulate = (1, samples) if search.alone else (now.batch, now.accumulate)
    cached = 1 if hasattr(search.plan.stage, "cached_chunk") and batch > 1 else now.cached
    sharded = now.sharded or search.plan.setup.devices > 1
    return Choice(sharded, dict.fromkeys(search.now, KINDS[-1]), batch, accumulate, cached)


def _changes(plan: StagePlan, search: Search, least: Choice) -> Iterator[Advice]:
    """Changes of the training, the smallest first, each with the memory after it."""
    if not search.alone and least.cached is None:
        yield from _fewer_pairs(plan, search, least)
    words = " ".join(words_of(plan, least))
    if plan.precision.startswith("32"):
        yield _with(plan, least, f"{words} trainer.precision=bf16-mixed", precision="bf16-mixed")
    yield from _smaller_pictures(plan, least, words)
    plan.meta_stage.prepare(plan.precision, plan.step)
    trained = {name: _learnt(part) for name, part in parts_of(plan.stage.model).items()}
    parts = [name for name, size in trained.items() if size and not name.startswith("objectives")]
    if len(parts) > 1:
        largest = max(parts, key=trained.__getitem__)
        without = f"stages.{plan.name}.module.train without {largest}"
        yield _with(plan, least, f"{words} and {without}", frozen=largest)


def _learnt(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters() if p.requires_grad)


def _smaller_pictures(plan: StagePlan, least: Choice, words: str) -> Iterator[Advice]:
    """None for parts that take one size only, as a pair of towers does."""
    patch = getattr(plan.stage.model.encoder, "patch_size", 0)
    side = plan.settings.parts.encoder.get("image_size", 0)
    grid = int(side * SMALLER / patch) // 2 * 2 if patch else 0  # even, for pixel shuffle
    if grid:
        with suppress(ValueError):
            size = grid * patch
            yield _with(plan, least, f"{words} encoder.image_size={size}", image_size=size)


def _fewer_pairs(plan: StagePlan, search: Search, least: Choice) -> Iterator[Advice]:
    """Smaller micro-batches of a contrast that cannot embed some pairs at a time."""
    room = ROOM * plan.setup.capacity
    for batch in (size for size in range(plan.batch - 1, 1, -1) if plan.batch % size == 0):
        smaller = replace(least, batch=batch, accumulate=plan.accumulate * plan.batch // batch)
        found = search.found(smaller)
        if found.memory.total <= room or batch == 2:
            yield _of(plan, found, f"{OTHER}: fewer pairs are compared at once")
            return


def _with(plan: StagePlan, choice: Choice, words: str, **change: Any) -> Advice:
    """A change beside a choice (see `StagePlan.changed`)."""
    changed = plan.changed(recompute=KINDS[-1], **change)
    changed = replace(changed, measured=replace(changed.measured, cached=choice.cached))
    bucketed = plan.setup.bucketed and not choice.sharded
    memory = changed.memory(choice.batch, sharded=choice.sharded, bucketed=bucketed)
    return Advice(words.strip(), memory, OTHER)
