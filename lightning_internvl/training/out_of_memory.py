"""Out of memory, told with what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_internvl.choices import PARTS
from lightning_internvl.config.stage_settings import StageSettings

SIGNS = ("not enough memory: you tried to allocate", "can't allocate memory", "CUDA out of memory", "_STATUS_ALLOC_FAILED")


@contextmanager
def explain_out_of_memory(settings: StageSettings) -> Iterator[None]:
    """Say in plain words that a stage does not fit into memory, on a GPU or on a CPU.

    Raises:
        ValueError: with the batch that it met, where it is known, and with what to lower.
    """
    try:
        yield
    except Exception as error:
        if (found := out_of_memory_cause(error)) is None:
            raise
        where = "\n".join(getattr(error, "__notes__", [])) or f"stage {settings.name}, while it was prepared"
        reason = str(found).strip().split("\n")[0][:300] or type(found).__name__
        advice = "\n".join(f"  {line}" for line in advice_for(settings))
        raise ValueError(f"out of memory: {where}\n{reason}\nwhat takes less:\n{advice}") from error


def out_of_memory_cause(error: BaseException | None) -> BaseException | None:
    """The error, or the one behind it, that says that memory ran out."""
    seen: set[int] = set()  # a library may have made a circle of them
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS):
            return error
        error = error.__cause__
    return None


def advice_for(settings: StageSettings) -> Iterator[str]:
    """What may be lowered in a stage as it is set, the least harmful first."""
    name, batch, module, data, parts = settings.name, settings.batch_size, settings.module, settings.data, settings.parts
    recomputed = settings.activation_checkpointing
    if any(getattr(parts, part) and recomputed.get(part) != "full" for part in PARTS):
        yield "activation_checkpointing=full (a third slower)"
    if "cached_chunk" in module:
        chunk = max(1, (module["cached_chunk"] or batch) // 2)
        yield f"stages.{name}.module.cached_chunk={chunk} (the same batch, embedded {chunk} pairs at a time)"
    elif batch > 1:
        times = 2 * settings.trainer.accumulate_grad_batches
        contrast = "; a contrast then compares fewer pairs" if "itc" in parts.objectives else ""
        yield (
            f"stages.{name}.batch_size={batch // 2} with +stages.{name}.trainer.accumulate_grad_batches={times} "
            f"(the same samples a step{contrast})"
        )
    if data.packing in (True, "packed"):
        now = data.packing_tokens or "as many as one conversation may have"
        yield f"data.packing_tokens=N, the tokens of a row (now {now})"
    if parts.decoder and not (parts.quantization and parts.peft):
        yield "peft=qlora (adapters on frozen weights in 4 bits), or quantization=nf4 for parts that are frozen anyhow"
    if settings.trainer.precision == "32-true" and torch.cuda.is_available():
        yield "trainer.precision=bf16-mixed"
    yield "plan=true shows what each stage needs, and the largest batch that fits into device_memory=GIB"
