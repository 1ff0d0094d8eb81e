"""Two ways to the same numbers: packed and padded, accumulated and at once, resumed and not, merged
and not, each attention."""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from lightning_internvl.choices import BACKENDS
from lightning_internvl.data.collate.packed import PackedChats
from lightning_internvl.decoders.plora import mark
from lightning_internvl.doctor.harness import GRADIENT, LOSS, Gradients, Harness, Result, same_bits, widen
from lightning_internvl.layers import peft
from lightning_internvl.layers.attention import choose_backend, keep_backend
from lightning_internvl.layers.expert_layers import ExpertLinear
from lightning_internvl.layers.hf_attention import use_ours
from lightning_internvl.messages import first_of
from lightning_internvl.model.compatibility import check_packable
from lightning_internvl.objectives import DPO, ORPO, Classification, NextToken, SimPO

LOW = 3e-2  # how far kernels that compute in 16 bits may differ
ALONE = (NextToken, Classification, DPO, ORPO, SimPO)  # objectives that judge each sample for itself


def check_packed_rows(harness: Harness) -> Iterator[Result]:
    """Samples that share rows give the loss and gradients of rows of their own."""
    name, model = "packed = unpacked", harness.stage.model
    if harness.settings.reads != "chats" or "next_token" not in harness.stage.objectives:
        yield Result(name, None, "this stage packs nothing")
        return
    try:
        check_packable(model.decoder)
    except ValueError as error:
        yield Result(name, None, str(error).partition(";")[0])
        return
    rows = [harness.samples[:2], harness.samples[2:]]
    with harness.with_large_weights():
        alone = harness.gradients(harness.batch())
        # it needs no more than any chat collator has
        packed_rows = PackedChats.pack(harness.collate, rows)
        together = harness.gradients(harness.to_device(packed_rows))
    yield _compared(name, together, alone, f"{len(harness.samples)} samples in {len(rows)} rows")


def check_accumulation(harness: Harness) -> Iterator[Result]:
    """Two micro-batches with unequally many labels make the step of one batch with all samples."""
    name, objectives = "accumulated = large batch", harness.stage.model.objectives
    found = harness.stage.losses(harness.batch())
    names = [n for n in harness.stage.objectives if n in found]  # one may only judge tokens for another
    alone = [n for n in names if isinstance(objectives[n], ALONE)]
    others = [n for n in names if n not in alone]
    left_out = f"not for {', '.join(others)}, which compares the samples of a micro-batch" if others else ""
    if not alone:
        yield Result(name, None, left_out)
        return
    with harness.with_large_weights():
        compared = [n for n in found if n not in alone]
        harness.stage.weights = {**harness.stage.weights, **dict.fromkeys(compared, 0.0)}
        halves = [harness.batch(half) for half in harness.halves]
        parts, whole = (
            harness.gradients(*halves),
            harness.gradients(harness.batch([one for half in harness.halves for one in half])),
        )
    yield _compared(name, parts, whole, "; ".join(filter(None, (f"2 micro-batches, {', '.join(alone)}", left_out))))


def check_resume(harness: Harness) -> Iterator[Result]:
    """Two steps with a saved and loaded checkpoint between give the weights of two without."""
    name = "resumed = uninterrupted"
    with harness.keep_state() as start:
        optimizer, scheduler = _built(harness)
        _step(harness, optimizer, scheduler, 0)
        saved = _saved(harness, optimizer, scheduler)
        _step(harness, optimizer, scheduler, 1)
        through = harness.tensors()
        harness.restore(start)
        optimizer, scheduler = _built(harness)
        _load(harness, saved, optimizer, scheduler)
        _step(harness, optimizer, scheduler, 1)
        again = harness.tensors()
    # on a GPU sums of one step may already differ in their order
    exact = harness.device.type == "cpu"
    differ = [n for n, x in through.items() if not (same_bits(x, again[n]) if exact else _near(again[n], x))]
    found = f"{len(differ)} of {len(through)} tensors differ: {first_of(differ)}"
    size = f"{len(saved) / 2**20:.1f} MiB saved"
    same = f"{len(through)} tensors, {'the same bits' if exact else 'alike'}; {size}"
    yield Result(name, not differ, found if differ else same)


def check_backends(harness: Harness) -> Iterator[Result]:
    """All attention backends that run here give the loss and gradients of the formula (`math`)."""
    name, names = "attention backends agree", []
    for backend in BACKENDS:
        try:
            with keep_backend():
                _choose(harness, backend)
        except ValueError:
            continue
        names += [backend] if backend not in ("auto", "math") else []
    language_model = getattr(harness.stage.model.decoder, "lm", None)
    if isinstance(language_model, PreTrainedModel):
        use_ours(language_model)
    with keep_backend(), harness.with_large_weights():
        found = {backend: _by(harness, backend) for backend in ("math", *names)}
    results = [_compared(name, found[b], found["math"], f"{b} and math", low=_is_low(harness, b)) for b in names]
    failed = [result for result in results if not result.passed]
    yield Result(name, not failed, "; ".join(result.detail for result in failed or results))


def check_merge(harness: Harness) -> Iterator[Result]:
    """Weights to which the adapters have been added do what weights and adapters do, in each layer
    and in all. The stage has no adapters afterwards."""
    name, model = "merged = adapter", harness.stage.model
    layers = dict(peft.adapted_layers(model))
    if not layers:
        yield Result(name, None, "this stage has no adapters")
        return
    with torch.no_grad(), harness.exact_arithmetic():
        torch.manual_seed(harness.settings.seed)
        widen(model)
        for inner, parameter in model.named_parameters():
            if ".lora_B." in inner:  # zero at the start, which would hide that an update is lost
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        harness.stage.eval()
        # experts are no layers once they are merged: the loss judges them
        plain = {n: layer.get_base_layer() for n, layer in layers.items() if not isinstance(layer, ExpertLinear)}
        inputs = {n: torch.randn(4, base.in_features, device=harness.device) for n, base in plain.items()}
        exact = all(layer.get_base_layer().weight.dtype == torch.float32 for layer in layers.values())
        loss = float(harness.loss(harness.batch()))
        mark(model, None)  # Partial LoRA still knows the rows of that batch
        states = {n: layers[n](x) for n, x in inputs.items()}
        peft.merge(model)
        afters = {n: model.get_submodule(n)(x) for n, x in inputs.items()}
        after = float(harness.loss(harness.batch()))
    limit = LOSS if exact else LOW
    worst = {n: _distance(afters[n], x) for n, x in states.items()}
    wrong = [f"{n} ({x:.1e})" for n, x in worst.items() if not x <= limit]
    change = abs(after - loss) / max(abs(loss), 1e-12)
    detail = f"{len(layers)} layers by up to {max(worst.values(), default=0.0):.1e}, the loss by {change:.1e}"
    yield Result(name, not wrong and change <= limit, f"differ: {first_of(wrong)}; the loss by {change:.1e}" if wrong else detail)


def _compared(name: str, one: Gradients, two: Gradients, what: str, low: bool = False) -> Result:
    loss, gradient = one.differ(two)
    passed = loss <= (LOW if low else LOSS) and gradient <= (LOW if low else GRADIENT)
    return Result(name, passed, f"{what}: loss differs by {loss:.1e}, gradient by {gradient:.1e}")


def _is_low(harness: Harness, backend: str) -> bool:
    return harness.device.type == "cuda" and backend in ("flash", "xformers")


def _choose(harness: Harness, backend: str) -> None:
    choose_backend(backend, harness.device, torch.bfloat16 if _is_low(harness, backend) else torch.float32)


def _by(harness: Harness, backend: str) -> Gradients:
    _choose(harness, backend)
    # these kernels read 16 bits only
    low = torch.autocast("cuda", torch.bfloat16, enabled=_is_low(harness, backend))
    with low:
        return harness.gradients(harness.batch())


def _built(harness: Harness) -> tuple[Optimizer, LRScheduler]:
    optimizer = harness.optimizer()
    return optimizer, harness.stage.scheduler(optimizer, total_steps=harness.stage.max_steps)


def _step(harness: Harness, optimizer: Optimizer, scheduler: LRScheduler, number: int) -> None:
    optimizer.zero_grad(set_to_none=True)
    harness.loss(harness.batch(harness.halves[number % 2])).backward()
    optimizer.step()
    scheduler.step()


def _saved(harness: Harness, optimizer: Optimizer, scheduler: LRScheduler) -> bytes:
    """What a checkpoint holds."""
    checkpoint = {"state_dict": harness.stage.state_dict()}
    harness.stage.on_save_checkpoint(checkpoint)
    file = io.BytesIO()
    torch.save(checkpoint | {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    return file.getvalue()


def _load(harness: Harness, saved: bytes, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    checkpoint = torch.load(io.BytesIO(saved), map_location=harness.device, weights_only=True)
    harness.stage.on_load_checkpoint(checkpoint)
    harness.stage.load_state_dict(checkpoint["state_dict"], strict=harness.stage.strict_loading)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])


def _distance(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm().clamp(min=1e-12))


def _near(one: Tensor, two: Tensor) -> bool:
    return bool(torch.allclose(one.float(), two.float(), rtol=1e-4, atol=1e-6))
