"""What a step must do to every weight, and what the data must hold. Each check takes a harness and
gives what it has found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_internvl.data.collate.pairs_of_answers import COPIES
from lightning_internvl.doctor.harness import Harness, Result, labels_of, same_bits
from lightning_internvl.messages import first_of
from lightning_internvl.model.videos import join_pictures_and_videos
from lightning_internvl.model.vlm import shifts_labels

# the first one moves what starts at zero (LoRA's B, gates), the second what lies behind it
STEPS = 3


def one_group(harness: Harness) -> Iterator[Result]:
    """Each parameter that the stage ever trains is in one group of the optimizer, no other."""
    name = "one optimizer group each"
    try:
        groups = harness.stage.optimizer(harness.stage.model, harness.stage.plan).param_groups
    except ValueError as error:
        yield Result(name, False, f"the optimizer cannot be built: {error}")
        return
    times = Counter(id(parameter) for group in groups for parameter in group["params"])
    named = list(harness.stage.model.named_parameters())
    trained = [(n, p) for n, p in named if harness.stage.plan.ever_trains(n)]
    missing = [n for n, p in trained if times[id(p)] == 0]
    twice = [n for n, p in trained if times[id(p)] > 1]
    frozen = [n for n, p in named if not harness.stage.plan.ever_trains(n) and times[id(p)]]
    unknown = len(times.keys() - {id(p) for _, p in named})
    kinds = {"in none": missing, "in several": twice, "frozen": frozen}
    faults = [f"{what}: {first_of(names)}" for what, names in kinds.items() if names]
    faults += [f"{unknown} that are not of the model"] if unknown else []
    yield Result(name, not faults, "; ".join(faults) or f"{len(trained)} tensors in {len(groups)} groups")


def step_by_step(harness: Harness) -> Iterator[Result]:
    """In a few steps at each state of the freezing schedule every trained parameter gets a finite
    gradient and changes, and every frozen tensor stays as it is, bit by bit."""
    last = harness.settings.max_steps - 1
    states = sorted({min(step, last) for step in harness.stage.plan.changes()})
    for state in states:
        with harness.keep_state() as before:
            harness.stage.plan.apply(harness.stage.model, state)
            yield from _after_steps(harness, before, f" from step {state}" if len(states) > 1 else "")


def _after_steps(harness: Harness, before: dict[str, Tensor], when: str) -> Iterator[Result]:
    model, optimizer = harness.stage.model, harness.optimizer()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lacking, wrong = set(trained), set[str]()
    for number in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        harness.loss(harness.batch(harness.halves[number % 2])).backward()
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        lacking -= gradients.keys()
        # Of the first step that has any: weights that became NaN by it would name all others.
        wrong = wrong or {name for name, x in gradients.items() if not x.isfinite().all()}
        optimizer.step()
    advice = "leave out of module.train what this stage does not use"
    told = [f"no gradient ({advice}): {first_of(sorted(lacking))}"] if lacking else []
    told += [f"NaN or infinite: {first_of(sorted(wrong))}"] if wrong else []
    yield Result(f"finite gradients{when}", not told, "; ".join(told) or f"{len(trained)} tensors, {STEPS} steps")
    after = harness.tensors()
    still = [name for name in trained if same_bits(before[name], after[name])]
    idle = _without_effect(harness, [name for name in still if name not in lacking])
    stuck, moved = [name for name in still if name not in idle], len(trained) - len(still)
    note = f"; {len(idle)} reach no loss, whatever they hold: {first_of(idle)}" if idle else ""
    detail = f"unchanged: {first_of(stuck)}" if stuck else f"{moved} tensors changed in {STEPS} steps{note}"
    yield Result(f"trained weights change{when}", not stuck and moved > 0, detail)
    parts = {name.partition(".")[0] for name in trained}
    parameters = {name for name, _ in model.named_parameters()}
    # buffers count
    fixed = [n for n in before if n not in trained and (n in parameters or n.partition(".")[0] not in parts)]
    other = [name for name in fixed if not same_bits(before[name], after[name])]
    same = f"{len(fixed)} tensors, the same bits after {STEPS} steps"
    detail = f"changed: {first_of(other)}" if other else same if fixed else "nothing is frozen"
    yield Result(f"frozen weights stay{when}", not other if fixed else None, detail)


def _without_effect(harness: Harness, names: list[str]) -> list[str]:
    """Those of the weights whose gradient is zero with other weights too: nothing reads what they
    compute, as in the last layer of a stream that ends there. A weight that is only stuck at zero
    is not among them."""
    if not names:
        return []
    with harness.with_large_weights():
        found = harness.gradients(harness.batch()).found
        return [name for name in names if not found[name].any()]


def saved_activations(harness: Harness) -> Iterator[Result]:
    """Frozen linear layers save nothing for gradients of their weights, and frozen parts with
    nothing trained before them save nothing at all."""
    model = harness.stage.model
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    linear = {n: m for n, m in linear.items() if not m.weight.requires_grad}
    towers: dict[str, nn.Module] = {}
    for name in ("encoder", "middleware"):
        part = getattr(model, name)
        if any(p.requires_grad for p in part.parameters()):
            break
        towers[name] = part
    if not linear and not towers:
        yield Result("frozen parts save nothing", None, "nothing is frozen")
        return
    saved = _saved_inside(harness, {**linear, **towers})
    found = [f"{name} ({count} tensors)" for name, count in saved.items()]
    checked = f"{len(linear)} linear layers" + "".join(f", {name}" for name in towers)
    yield Result("frozen parts save nothing", not found, f"activations of {first_of(found)}" if found else checked)


def _saved_inside(harness: Harness, modules: dict[str, nn.Module]) -> dict[str, int]:
    """How many tensors but weights each module saved for the backward pass of a step."""
    weights = {p.untyped_storage().data_ptr() for p in harness.stage.model.parameters()}
    saved, inside = Counter[str](), list[str]()

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.update(set(inside))
        return tensor.detach()

    def enter(name: str, *_: Any) -> None:
        inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    hooks = [m.register_forward_pre_hook(partial(enter, name)) for name, m in modules.items()]
    hooks += [
        module.register_forward_hook(leave, prepend=True) for module in modules.values()
    ]  # before what hooks add (Partial LoRA)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            harness.loss(harness.batch())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: saved[name] for name in modules if saved[name]}


def labels(harness: Harness) -> Iterator[Result]:
    """Every sample has something to learn: labels that are not all masked."""
    name, masked, shares = "labels not all masked", [], []
    shift = int(harness.settings.reads == "chats" and shifts_labels(harness.stage.model.decoder))
    for one in harness.samples:
        for key, found in labels_of(harness.batch([one])).items():
            judged = found[:, shift:] if found.ndim > 1 else found
            shares.append(float((judged >= 0).float().mean()))
            masked += [f"{one['key']} ({key})"] if shares[-1] == 0 else []
    if not shares:
        yield Result(name, None, "this stage learns from pairs, without labels")
        return
    detail = f"{min(shares):.0%} to {max(shares):.0%} of a sample, {len(harness.samples)} samples"
    yield Result(name, not masked, f"nothing to learn in {first_of(masked)}" if masked else detail)


@torch.no_grad()
def placeholders(harness: Harness) -> Iterator[Result]:
    """The text of every sample has a placeholder for each visual token."""
    name, model = "placeholders = visual tokens", harness.stage.model
    if harness.settings.reads != "chats":
        yield Result(name, None, "this stage reads no placeholders")
        return
    faults, total = [], 0
    for one in harness.samples:
        batch = harness.batch([one])
        kinds = [kind for kind in (model.image_token_id, model.video_token_id) if kind is not None]
        places = sum(int((batch["input_ids"] == kind).sum()) for kind in kinds)
        pixels, _, inputs = join_pictures_and_videos(batch.pop("pixel_values"), batch)
        assert pixels is not None  # without pictures it is (0, 3, S, S)
        visual = model.visual_tokens(pixels, **inputs) if len(pixels) else pixels
        tokens = len(visual) if model.attends or not len(pixels) else len(visual.flatten(0, -2))
        tokens *= batch.get(COPIES, 1)
        total += places
        faults += [f"{one['key']}: {places} placeholders, {tokens} visual tokens"] if places != tokens else []
    yield Result(name, not faults, first_of(faults) or f"{total} of each in {len(harness.samples)} samples")
