"""Two ways to the same numbers: packed and padded, accumulated and at once, resumed and not, merged and not, each attention."""

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
from lightning_internvl.decoders.hf_attention import use_ours
from lightning_internvl.decoders.plora import mark
from lightning_internvl.doctor.rig import GRADIENT, LOSS, Gradients, Result, Rig, same_bits, widen
from lightning_internvl.layers import peft
from lightning_internvl.layers.attention import backend_kept, choose_backend
from lightning_internvl.messages import first_of
from lightning_internvl.model.compatibility import check_packable
from lightning_internvl.objectives import Classification, NextToken

LOW = 3e-2  # how far kernels that compute in 16 bits may differ
ALONE = (NextToken, Classification)  # objectives that judge each sample for itself


def packed(rig: Rig) -> Iterator[Result]:
    """Samples that share rows give the loss and the gradients that they give in rows of their own."""
    name, model = "packed = unpacked", rig.stage.model
    if rig.settings.reads != "chats" or "next_token" not in rig.stage.objectives:
        yield Result(name, None, "this stage packs nothing")
        return
    try:
        check_packable(model.decoder)
    except ValueError as error:
        yield Result(name, None, str(error).partition(";")[0])
        return
    rows = [rig.samples[:2], rig.samples[2:]]
    with rig.loud():
        alone = rig.gradients(rig.batch())
        together = rig.gradients(rig.moved(PackedChats.pack(rig.collate, rows)))  # it needs no more than any chat collator has
    yield _compared(name, together, alone, f"{len(rig.samples)} samples in {len(rows)} rows")


def accumulated(rig: Rig) -> Iterator[Result]:
    """Two micro-batches with unequally many labels make the step of one batch with all samples."""
    name, objectives = "accumulated = large batch", rig.stage.model.objectives
    alone = [n for n in rig.stage.objectives if isinstance(objectives[n], ALONE)]
    others = [n for n in rig.stage.objectives if n not in alone]
    left_out = f"not for {', '.join(others)}, which compares the samples of a micro-batch" if others else ""
    if not alone:
        yield Result(name, None, left_out)
        return
    with rig.loud():
        compared = {n for n in rig.stage.losses(rig.batch()) if n not in alone}
        rig.stage.weights = {**rig.stage.weights, **dict.fromkeys(compared, 0.0)}
        halves = [rig.batch(half) for half in rig.halves]
        parts, whole = rig.gradients(*halves), rig.gradients(rig.batch([one for half in rig.halves for one in half]))
    yield _compared(name, parts, whole, "; ".join(filter(None, (f"2 micro-batches, {', '.join(alone)}", left_out))))


def resumed(rig: Rig) -> Iterator[Result]:
    """Two steps with a checkpoint, saved and loaded, between them lead to the weights of two steps without."""
    name = "resumed = uninterrupted"
    with rig.kept() as start:
        optimizer, scheduler = _built(rig)
        _step(rig, optimizer, scheduler, 0)
        saved = _saved(rig, optimizer, scheduler)
        _step(rig, optimizer, scheduler, 1)
        through = rig.tensors()
        rig.restore(start)
        optimizer, scheduler = _built(rig)
        _load(rig, saved, optimizer, scheduler)
        _step(rig, optimizer, scheduler, 1)
        again = rig.tensors()
    exact = rig.device.type == "cpu"  # on a GPU sums of one step may already differ in their order
    differ = [n for n, x in through.items() if not (same_bits(x, again[n]) if exact else _near(again[n], x))]
    found = f"{len(differ)} of {len(through)} tensors differ: {first_of(differ)}"
    size = f"{len(saved) / 2**20:.1f} MiB saved"
    yield Result(
        name, not differ, found if differ else f"{len(through)} tensors, {'the same bits' if exact else 'alike'}; {size}"
    )


def backends(rig: Rig) -> Iterator[Result]:
    """All attention backends that run here give the loss and the gradients of the formula as written (`math`)."""
    name, names = "attention backends agree", []
    for backend in BACKENDS:
        try:
            with backend_kept():
                _choose(rig, backend)
        except ValueError:
            continue
        names += [backend] if backend not in ("auto", "math") else []
    language_model = getattr(rig.stage.model.decoder, "lm", None)
    if isinstance(language_model, PreTrainedModel):
        use_ours(language_model)
    with backend_kept(), rig.loud():
        found = {backend: _by(rig, backend) for backend in ("math", *names)}
    results = [_compared(name, found[b], found["math"], f"{b} and math", low=_is_low(rig, b)) for b in names]
    failed = [result for result in results if not result.passed]
    yield Result(name, not failed, "; ".join(result.detail for result in failed or results))


def merged(rig: Rig) -> Iterator[Result]:
    """Weights to which the adapters have been added do what weights and adapters do, in each layer and in all. The stage has no
    adapters afterwards."""
    name, model = "merged = adapter", rig.stage.model
    layers = dict(peft.adapted(model))
    if not layers:
        yield Result(name, None, "this stage has no adapters")
        return
    with torch.no_grad(), rig.exactly():
        torch.manual_seed(rig.settings.seed)
        widen(model)
        for inner, parameter in model.named_parameters():
            if ".lora_B." in inner:  # zero at the start, which would hide that an update is lost
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        rig.stage.eval()
        inputs = {n: torch.randn(4, layer.get_base_layer().in_features, device=rig.device) for n, layer in layers.items()}
        exact = all(layer.get_base_layer().weight.dtype == torch.float32 for layer in layers.values())
        loss = float(rig.loss(rig.batch()))
        mark(model, None)  # Partial LoRA still knows the rows of that batch
        states = {n: layer(inputs[n]) for n, layer in layers.items()}
        peft.merge(model)
        afters = {n: model.get_submodule(n)(x) for n, x in inputs.items()}
        after = float(rig.loss(rig.batch()))
    limit = LOSS if exact else LOW
    worst = {n: _distance(afters[n], x) for n, x in states.items()}
    wrong = [f"{n} ({x:.1e})" for n, x in worst.items() if not x <= limit]
    change = abs(after - loss) / max(abs(loss), 1e-12)
    detail = f"{len(layers)} layers by up to {max(worst.values()):.1e}, the loss by {change:.1e}"
    yield Result(name, not wrong and change <= limit, f"differ: {first_of(wrong)}; the loss by {change:.1e}" if wrong else detail)


def _compared(name: str, one: Gradients, two: Gradients, what: str, low: bool = False) -> Result:
    loss, gradient = one.differ(two)
    passed = loss <= (LOW if low else LOSS) and gradient <= (LOW if low else GRADIENT)
    return Result(name, passed, f"{what}: loss differs by {loss:.1e}, gradient by {gradient:.1e}")


def _is_low(rig: Rig, backend: str) -> bool:
    return rig.device.type == "cuda" and backend in ("flash", "xformers")


def _choose(rig: Rig, backend: str) -> None:
    choose_backend(backend, rig.device, torch.bfloat16 if _is_low(rig, backend) else torch.float32)


def _by(rig: Rig, backend: str) -> Gradients:
    _choose(rig, backend)
    low = torch.autocast("cuda", torch.bfloat16, enabled=_is_low(rig, backend))  # these kernels read 16 bits only
    with low:
        return rig.gradients(rig.batch())


def _built(rig: Rig) -> tuple[Optimizer, LRScheduler]:
    optimizer = rig.optimizer()
    return optimizer, rig.stage.scheduler(optimizer, total_steps=rig.stage.max_steps)


def _step(rig: Rig, optimizer: Optimizer, scheduler: LRScheduler, number: int) -> None:
    optimizer.zero_grad(set_to_none=True)
    rig.loss(rig.batch(rig.halves[number % 2])).backward()
    optimizer.step()
    scheduler.step()


def _saved(rig: Rig, optimizer: Optimizer, scheduler: LRScheduler) -> bytes:
    """What a checkpoint holds."""
    checkpoint = {"state_dict": rig.stage.state_dict()}
    rig.stage.on_save_checkpoint(checkpoint)
    file = io.BytesIO()
    torch.save(checkpoint | {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    return file.getvalue()


def _load(rig: Rig, saved: bytes, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    checkpoint = torch.load(io.BytesIO(saved), map_location=rig.device, weights_only=True)
    rig.stage.on_load_checkpoint(checkpoint)
    rig.stage.load_state_dict(checkpoint["state_dict"], strict=rig.stage.strict_loading)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])


def _distance(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm().clamp(min=1e-12))


def _near(one: Tensor, two: Tensor) -> bool:
    return bool(torch.allclose(one.float(), two.float(), rtol=1e-4, atol=1e-6))
