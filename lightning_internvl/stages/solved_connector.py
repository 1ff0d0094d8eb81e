"""A connector whose linear layers are solved in closed form, not trained: steps add up the sums of a
ridge regression, and at the end of its share of them a layer is set to the solution.

What a layer is to give is said by the stage (see `transplant` and `transplant_decoder`); how a
layer is solved from sums: `lightning_internvl.layers.least_squares`.

Letters: N places, D width of what a layer reads, H width of what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_internvl.console import console
from lightning_internvl.distributed.collectives import all_reduce_sum, rank
from lightning_internvl.layers.least_squares import NormalEquations, Solution, solve
from lightning_internvl.messages import check_number
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.base import Batch, Stage

KINDS = ("seen", "held_out")  # of sums: those that a layer is solved from, and those that judge it
STATE = "transplant"  # in a checkpoint


class SolvedConnector(Stage):
    """Its steps are shared out among the linear layers of the connector that are to be solved, and
    each is solved at the end of its share. No gradient is followed.

    Args:
        layers: which linear layers of the connector, as `linear_places` counts them.
        judge_every: of so many steps the pictures of one are held out: they choose the penalty and
            say how good the solution is.
        settings: of `Stage`.

    Attributes:
        measured: R^2 of the visual tokens at held-out places (`tokens_explained`), and of the first
            layer the places that it was solved from (`places`) and the directions in which its inputs
            differ (`rank`).

    Raises:
        ValueError: for too few steps.
    """

    swaps_a_part = True
    teacher: tuple[Any]  # the old parts, a module; in a tuple, so that they are no part of the stage's own weights

    def __init__(self, model: VLM, *, layers: slice = slice(None), judge_every: int = 5, **settings: Any) -> None:
        super().__init__(model, **settings)
        check_number(f"stages.{self.name}.module.judge_every", judge_every, least=2, whole=True)
        self.judge_every = judge_every
        self.layers = linear_places(chain_of(model.middleware))[layers]
        self.ends = [self.max_steps * (place + 1) // len(self.layers) for place in range(len(self.layers))]
        if self.max_steps < 2 * len(self.layers):
            fault = f"solves {len(self.layers)} layers, each from one step or more and judged by another"
            raise ValueError(f"stages.{self.name} {fault}; give max_steps={2 * len(self.layers)} or more")
        self.sums = self._no_sums()
        self.at_work: tuple[Tensor, Tensor] | None = None

    def wanted(self, pixels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the layer at work reads of pictures, and what it is to give: (N, D) and (N, H)."""
        raise TypeError(f"{type(self).__name__} must say what a layer is to give")

    def on_fit_start(self) -> None:
        """Raises ValueError where processes divide the weights of the connector."""
        if self.is_sharded:
            raise ValueError(f"stages.{self.name} solves layers that each process has whole; choose strategy=ddp for it")
        self.teacher[0].to(self.device)

    def of_start(self, tensors: Mapping[str, Tensor], name: str, use: str) -> Tensor:
        """A tensor of an old part. Raises ValueError if the start lacks it, with what it is for."""
        if name not in tensors:
            raise ValueError(f"stages.{self.name}: init_from lacks {name}, which {use}")
        return tensors[name]

    # --- steps --------------------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Which of the layers is at work."""
        return next(place for place, end in enumerate(self.ends) if self.global_step < end or end == self.ends[-1])

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`unexplained`: the squared distance of what the layer at work gives from what it is to
        give, by the variance of that."""
        layer = self._linear(self.number)
        pixels, inputs = batch.get("pixel_values"), {name: x for name, x in batch.items() if name != "pixel_values"}
        if pixels is None or not len(pixels):
            return {"unexplained": 0.0 * layer.weight.sum()}
        with torch.no_grad():
            x_ND, y_NH = self.wanted(pixels, inputs)
        self.at_work = x_ND, y_NH
        return {"unexplained": (layer(x_ND) - y_NH).square().mean() / y_NH.var(dim=0).mean().clamp(min=1e-12)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.at_work = None
        loss = super().training_step(batch, batch_idx)
        if self.at_work is not None:
            judges = (self.ends[self.number] - 1 - self.global_step) % self.judge_every == 0
            self.sums["held_out" if judges else "seen"].add(*self.at_work)
            self.at_work = None
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        layers = [self._linear(number) for number in range(len(self.layers))]
        optimizer = ClosedForm([p for layer in layers for p in layer.parameters()], self._end_step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, lambda step: 1.0), "interval": "step"}}

    def _end_step(self) -> None:
        """Solve the layer at work at the end of its share of the steps."""
        number, layer = self.number, self._linear(self.number)
        if self.global_step + 1 != self.ends[number] or layer.weight.is_meta:
            return
        seen, held_out = (self._total(self.sums[kind], layer) for kind in KINDS)
        prior = layer.weight.detach() if number else None  # the first layer's old weight reads another tower
        found = solve(seen, held_out, prior, bias=layer.bias is not None)
        with torch.no_grad():
            layer.weight.copy_(found.weight)
            if layer.bias is not None:
                layer.bias.copy_(found.bias)
        self.sums = self._no_sums(number + 1)
        self._tell(number, layer, found)

    def _tell(self, number: int, layer: nn.Linear, found: Solution) -> None:
        if number == 0:
            self.measured |= {"places": float(found.places), "rank": float(found.rank)}
        if number + 1 == len(self.layers):
            self.measured["tokens_explained"] = found.explained
        what = f"linear layer {number + 1} of {len(self.layers)} ({layer.in_features} -> {layer.out_features})"
        how = f"solved from {found.places:,} places, rank {found.rank}, penalty {found.penalty:g}"
        console.print(f"{self.name}: {what} {how}; R^2 {found.explained:.3f} at held-out places", soft_wrap=True)

    # --- sums ---------------------------------------------------------------------------------------------------------

    def _linear(self, number: int) -> nn.Linear:
        layer = chain_of(self.model.middleware)[self.layers[number]]
        assert isinstance(layer, nn.Linear)  # `linear_places` has found it
        return layer

    def _no_sums(self, number: int = 0) -> dict[str, NormalEquations]:
        layer = self._linear(min(number, len(self.layers) - 1))
        return {kind: NormalEquations(layer.in_features, layer.out_features) for kind in KINDS}

    def _total(self, own: NormalEquations, layer: nn.Linear) -> NormalEquations:
        sums = {name: all_reduce_sum(value) for name, value in own.sums.items()}
        return NormalEquations(layer.in_features, layer.out_features, sums)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        layer = self._linear(self.number)
        total = {kind: self._total(self.sums[kind], layer) for kind in KINDS}
        checkpoint[STATE] = {"measured": self.measured, **{kind: one.sums for kind, one in total.items()}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[STATE]
        self.measured = dict(state["measured"])
        # sums over all processes; but for the first they begin with none
        inputs, outputs = state["seen"]["xy"].shape
        self.sums = {kind: NormalEquations(inputs, outputs, state[kind] if rank() == 0 else None) for kind in KINDS}


class ClosedForm(torch.optim.Optimizer):
    """Follows no gradient: after each step it says that this has ended, and what calls it solves.

    Args:
        parameters: that are solved.
        ended: called at the end of each step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ended: Callable[[], None]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.ended = ended

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the step, and end it."""
        loss = closure() if closure else None
        self.ended()
        return loss


def chain_of(middleware: nn.Module) -> list[nn.Module]:
    """The modules between tower and language model, one after the other."""
    module = middleware.get_submodule(getattr(middleware, "projection"))  # noqa: B009 (of an attribute that not all have)
    return list(module) if isinstance(module, nn.Sequential) else [module]


def linear_places(chain: Sequence[nn.Module]) -> list[int]:
    """Where its linear layers stand."""
    return [place for place, module in enumerate(chain) if isinstance(module, nn.Linear)]


def through(chain: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What modules make of something one after the other."""
    for module in chain:
        x = module(x)
    return x


def connector_reads(model: VLM, pixels_N3SS: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What the first module of the connector is given: (N, T, D)."""
    found: list[Tensor] = []
    middleware = model.middleware
    if hasattr(middleware, "as_squares"):
        pixels_N3SS, inputs = middleware.as_squares(pixels_N3SS, inputs)
    projection = middleware.get_submodule(middleware.projection)
    hook = projection.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    try:
        model.visual_tokens(pixels_N3SS, **inputs)
    finally:
        hook.remove()
    return found[0]
