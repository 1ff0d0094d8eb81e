"""One stage measured on the meta device: FLOPs and kept bytes by micro-batch."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_internvl.data.collate.embedding import batches_of, with_batches
from lightning_internvl.objectives import NextToken, SigLIP
from lightning_internvl.plan.kernels import Kernels
from lightning_internvl.plan.meter import ACTIVATIONS, COPIES, LOGITS, Meter, Tally, watch
from lightning_internvl.plan.units import Units
from lightning_internvl.stages import Stage

SAMPLES = (2, 4, 6)  # micro-batches that are measured; a contrast needs two pairs at least
# of the weights, and of automatic mixed precision
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}
ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}

Blank = Callable[[int, str], Mapping[str, Any]]  # so many samples, on a device


def precision_of(name: Any) -> str:
    """Lightning's precision under its full name.

    Raises:
        ValueError: for one that the plan does not know.
    """
    full = ALIASES.get(str(name), str(name))
    if full not in PRECISIONS:
        raise ValueError(f"trainer.precision={name}: plan=true knows {', '.join(PRECISIONS)}")
    return full


@dataclass(frozen=True)
class Curve:
    """A number by micro-batch: a parabola, because a contrast compares all pairs."""

    values: tuple[float, float, float]  # at `SAMPLES`

    @classmethod
    def through(cls, values: Sequence[float]) -> Curve:
        """The parabola through three values, the straight line through two."""
        x, y, *rest = values
        return cls((x, y, rest[0] if rest else y + (y - x) * (SAMPLES[2] - SAMPLES[1]) / (SAMPLES[1] - SAMPLES[0])))

    @property
    def linear(self) -> bool:
        """Whether it is a straight line."""
        return self.through(self.values[:2]) == self

    def __call__(self, batch: int) -> float:
        a, b, c = SAMPLES
        x, y, z = self.values
        first, second = (y - x) / (b - a), (z - y) / (c - b)
        return x + first * (batch - a) + (second - first) / (c - a) * (batch - a) * (batch - b)


@dataclass(frozen=True)
class Measured:
    """By part: FLOPs of a forward and of a training step, and bytes that autograd keeps, by kind
    (see `meter`); and the bytes of the batch. All is measured whole; what works in chunks, and so
    holds less, is named with what its chunk is compared with.

    Attributes:
        rows: bytes among the logits of a part that are no logits, but what is judged.
        judged: rows that a loss judges, for those that have a chunk, times the blocks that it works
            in.
        chunks: these chunks.
        cached: samples that are embedded at a time (GradCache); None: all.
    """

    forward: dict[str, Curve]
    training: dict[str, Curve]
    kept: dict[str, dict[str, Curve]]
    inputs: Curve
    rows: dict[str, Curve]
    judged: dict[str, Curve]
    chunks: dict[str, int]
    cached: int | None

    def activations(self, name: str, batch: int) -> float:
        """Bytes that are held of a part's activations."""
        return max(0.0, self.kept[ACTIVATIONS][name](min(batch, self.cached or batch)))

    def logits(self, name: str, batch: int) -> float:
        """Bytes that are held of what a loss keeps, or a part that it calls: the output layer
        behind a language model."""
        whole = self.kept[LOGITS][name](batch)
        rows = self.rows[name](batch) if name in self.rows else 0.0
        losses = [name] if name.startswith("objectives.") else list(self.judged)
        shares = [min(1.0, self.chunks[loss] / self.judged[loss](batch)) for loss in losses if loss in self.chunks]
        return max(0.0, rows + (whole - rows) * max(shares, default=1.0))

    @property
    def linear(self) -> bool:
        """Whether all that is kept grows in proportion to the batch."""
        return all(curve.linear for curves in self.kept.values() for curve in curves.values())


class MetaStage:
    """A stage on the meta device with a meter attached to its model.

    Args:
        blank: the batch of a given number of samples; it is made on the meta device, for pictures
            of large batches fill memory.
        world_size: processes that a contrast gathers from.
        recompute: parts whose blocks are computed again for the backward pass.
    """

    def __init__(
        self, stage: Stage, blank: Blank, world_size: int = 1, recompute: Mapping[str, str | None] | None = None
    ) -> None:
        self.stage, self.blank, self.world_size = stage, blank, world_size
        self.meter = Meter()
        self.units = Units(stage.model, self.meter, recompute or {})
        watch(self.meter, stage.model)
        for name, objective in stage.model.objectives.items():
            note = functools.partial(self._note_judged, f"objectives.{name}")
            objective.register_forward_pre_hook(note)
            if isinstance(objective, NextToken):  # which is also asked for log-probabilities
                told = _telling(objective.token_log_probabilities, functools.partial(note, objective))
                setattr(objective, "token_log_probabilities", told)  # noqa: B010 (a method)
        self.state: tuple[torch.dtype, int, str | None] | None = None  # that the stage is in

    def measure(
        self,
        precision: str = "32-true",
        step: int = 0,
        *,
        frozen: str | None = None,
        blank: Blank | None = None,
        kept_only: bool = False,
        linear: bool = False,
    ) -> Measured:
        """Run the stage's losses on meta tensors.

        Args:
            step: the optimizer step, for parts that join or freeze later.
            frozen: a part that is held still beside those that the stage freezes.
            blank: other batches than those of the stage.
            kept_only: count no FLOPs and leave the backward pass out; what is kept is known without
                it.
            linear: take two micro-batches and a straight line, where another measurement of the
                stage has shown one.
        """
        weights, _ = PRECISIONS[precision]
        self.prepare(precision, step, frozen)
        self.units.backward = not kept_only
        with _processes(self.world_size), _default_dtype(weights):
            tallies = [self.run((blank or self.blank)(batch, "meta"), precision) for batch in SAMPLES[: 2 if linear else 3]]
        return Measured(
            forward=_curves([tally.forward for tally, _ in tallies]),
            training=_curves([tally.forward + tally.backward for tally, _ in tallies]),
            kept={kind: _curves([tally.kept_bytes(kind) for tally, _ in tallies]) for kind in (ACTIVATIONS, LOGITS, COPIES)},
            inputs=Curve.through([size for _, size in tallies]),
            rows=_curves([tally.rows for tally, _ in tallies]),
            judged=_curves([tally.judged for tally, _ in tallies]),
            chunks=_chunks(self.stage.model.objectives),
            cached=getattr(self.stage, "cached_chunk", None),
        )

    def _note_judged(self, name: str, objective: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note what a loss is given: states of tokens (B, L, H), or embeddings of samples."""
        if not isinstance(inputs[0], Tensor):
            return  # log-probabilities, which another objective has given
        tokens = isinstance(objective, NextToken)
        blocks = self.world_size if isinstance(objective, SigLIP) else 1
        self.meter.width = inputs[0].shape[-1]
        self.meter.tally.judged[name] += blocks * (inputs[0].shape[:2].numel() if tokens else len(inputs[0]))

    def prepare(self, precision: str, step: int, frozen: str | None = None) -> None:
        """Bring the stage into its state at a step, and forget what was measured before."""
        stage, state = self.stage, (PRECISIONS[precision][0], step, frozen)
        if state == self.state:
            return
        if self.state is None or state[0] != self.state[0]:
            stage.to(state[0])
            held = [*stage.model.parameters(), *stage.model.buffers()]
            self.meter.weights = {x.untyped_storage()._cdata for x in held}
        if self.state is None or state[1:] != self.state[1:]:
            stage.assumed_step = step
            stage.train()
            stage.plan.apply(stage.model, step)
            if frozen:
                stage.model.get_submodule(frozen).requires_grad_(False).eval()
        self.units.kinds.clear()
        self.state = state

    def run(self, batch: Mapping[str, Any], precision: str = "32-true") -> tuple[Tally, int]:
        """One forward and backward pass as prepared: what was counted, the bytes of the batch."""
        (weights, autocast), meter, stage = PRECISIONS[precision], self.meter, self.stage
        kernels = self.units.kernels = Kernels(autocast)
        meter.is_copy = kernels.copied.__contains__
        batch = with_batches(batch, lambda rows: {key: _like(value, weights) for key, value in rows.items()})
        held = [x for rows in batches_of(batch) for x in rows.values() if isinstance(x, Tensor)]
        size = sum(x.untyped_storage().nbytes() for x in held)
        keeping = torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack)
        with torch.device("meta"), meter.scope() as tally, keeping:
            with meter if self.units.backward else nullcontext(), kernels:
                losses = stage.losses(batch)
                loss = stage.weighted_sum(losses)
            if self.units.backward:
                with meter:
                    meter.backward(loss.sum().backward)
                stage.zero_grad(set_to_none=True)
        return tally, size


def _telling(function: Callable[..., Any], note: Callable[[tuple[Any, ...]], None]) -> Callable[..., Any]:
    """A function of which is noted what it is given."""

    def told(*given: Any, **settings: Any) -> Any:
        note(given)
        return function(*given, **settings)

    return told


def _like(value: Any, dtype: torch.dtype) -> Any:
    """On the meta device, in the dtype of the weights where it holds fractions."""
    if not isinstance(value, Tensor):
        return value
    return value.to("meta", dtype if value.is_floating_point() else value.dtype)


def _chunks(objectives: nn.ModuleDict) -> dict[str, int]:
    """Rows that losses work on at a time, for those that do."""
    found = {f"objectives.{name}": getattr(x, "chunk", None) for name, x in objectives.items()}
    return {name: chunk for name, chunk in found.items() if chunk is not None}


def _curves(counts: list[Counter[str]]) -> dict[str, Curve]:
    names = dict.fromkeys(name for count in counts for name in count)
    return {name: Curve.through([count[name] for count in counts]) for name in names}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _processes(world_size: int) -> Iterator[None]:
    """As the first of many processes, with a communication that moves nothing."""
    import torch.distributed as dist

    if world_size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
