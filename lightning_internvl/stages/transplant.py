"""A new tower in front of a finished model: the connector is solved in closed form, so that it gives
what the old tower and connector give for the same pictures at the same places.

No gradient is followed. Each linear layer of the connector is a ridge regression (see
`lightning_internvl.layers.least_squares`) from what it reads to what the old connector's layer gives
there: first the first layer, which reads the new tower, then those behind it, which start from their
old weights and make up for what the layers before could not reach. That features of towers that were
trained apart are near a linear map from each other: model stitching (Lenc and Vedaldi 2015, section
4; Bansal et al. 2021).

Letters: N squares, T visual tokens of a square, D width of what a layer reads, H width of what it
gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_internvl.console import console
from lightning_internvl.distributed.collectives import all_reduce_sum, rank
from lightning_internvl.layers.least_squares import NormalEquations, Solution, solve
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import check_number
from lightning_internvl.model.compose import completed_middleware, trusted_build
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.base import Batch, Stage

KINDS = ("seen", "held_out")  # of sums: those that a layer is solved from, and those that judge it
STATE = "transplant"  # in a checkpoint


class TransplantStage(Stage):
    """Solves the connector of a model whose tower is another one now. Its steps are shared out
    among the linear layers of the connector, and each is solved at the end of its share.

    Args:
        old: what is replaced, as `init_from` has it: `encoder` and `middleware` (configurations), and
            how its pixels come from those of the new tower: `image_size`, and `scale` and `shift` of
            the channels. Filled in.
        weights_of: a run, a hand-off, an official checkpoint or a hub id with the weights of the new
            tower; None for one that brings its own. Filled in.
        judge_every: of so many steps the pictures of one are held out: they choose the penalty and
            say how good the solution is.
        settings: of `Stage`.

    Attributes:
        measured: R^2 of the visual tokens at held-out places (`tokens_explained`), and of the first
            layer the places that it was solved from (`places`) and the directions in which its inputs
            differ (`rank`).

    Raises:
        ValueError: for too few steps, or parts that are no chain of linear layers.
    """

    swaps_a_part = True

    def __init__(
        self,
        model: VLM,
        *,
        old: Mapping[str, Any] | None = None,
        weights_of: str | None = None,
        judge_every: int = 5,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        assert old is not None  # `training.transplant` has filled it in
        check_number(f"stages.{self.name}.module.judge_every", judge_every, least=2, whole=True)
        self.pixels, self.weights_of, self.judge_every = old, weights_of, judge_every
        self.teacher = (_tower(old, model.decoder.dim),)  # in a tuple: no part of the stage's own weights
        self.layers = linear_places(chain_of(model.middleware))
        self.ends = [self.max_steps * (place + 1) // len(self.layers) for place in range(len(self.layers))]
        if self.max_steps < 2 * len(self.layers):
            fault = f"solves {len(self.layers)} layers, each from one step or more and judged by another"
            raise ValueError(f"stages.{self.name} {fault}; give max_steps={2 * len(self.layers)} or more")
        self.sums = self._no_sums()
        self.at_work: tuple[Tensor, Tensor] | None = None

    # --- weights ------------------------------------------------------------------------------------------------------

    def start_tensors(
        self, tensors: Mapping[str, Tensor], read: Callable[[str], Mapping[str, Tensor]]
    ) -> tuple[Mapping[str, Tensor], set[str]]:
        """The old tower and connector take their weights; the model gets the new tower's, and of the
        connector what stands behind its first linear layer."""
        for name, own in own_tensors(self.teacher[0]).items():
            if name not in tensors:
                raise ValueError(f"stages.{self.name}: init_from lacks {name}, which the old connector is made of")
            own.copy_(tensors[name])
        first = chain_of(self.model.middleware)[: self.layers[0] + 1]
        fresh = {id(parameter) for module in first for parameter in module.parameters()}
        afresh = {name for name, parameter in self.model.named_parameters() if id(parameter) in fresh}
        kept = {name: x for name, x in tensors.items() if not name.startswith("encoder.") and name not in afresh}
        own_tower = read(self.weights_of) if self.weights_of else {}
        tower = {name: x for name, x in own_tower.items() if name.startswith("encoder.")}
        return kept | tower, set(tower)

    def on_fit_start(self) -> None:
        """Raises ValueError where processes divide the weights of the connector."""
        if self.is_sharded:
            raise ValueError(f"stages.{self.name} solves layers that each process has whole; choose strategy=ddp for it")
        self.teacher[0].to(self.device)

    # --- steps --------------------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Which of the linear layers is at work."""
        return next(place for place, end in enumerate(self.ends) if self.global_step < end or end == self.ends[-1])

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`unexplained`: the squared distance of what the layer at work gives from what the old
        connector's layer gives there, by the variance of that."""
        layer, place = self._linear(self.number), self.layers[self.number]
        pixels, inputs = batch.get("pixel_values"), {name: x for name, x in batch.items() if name != "pixel_values"}
        if pixels is None or not len(pixels):
            return {"unexplained": 0.0 * layer.weight.sum()}
        teacher, own = self.teacher[0].eval(), {name: x for name, x in inputs.items() if name != "picture_keys"}
        with torch.no_grad():
            reads = through(chain_of(self.model.middleware)[:place], _connector_reads(self.model, pixels, inputs))
            target = through(chain_of(teacher.middleware)[: place + 1], _connector_reads(teacher, self._as_before(pixels), own))
        target = at_places(target, reads.shape[1], special_tokens(teacher), special_tokens(self.model))
        x_ND, y_NH = reads.flatten(0, -2), target.flatten(0, -2).float()
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

    def _as_before(self, pixels_N3SS: Tensor) -> Tensor:
        """Pixels as the old tower reads them: its size, and its mean and deviation of the channels."""
        side, old = self.pixels["image_size"], next(self.teacher[0].parameters())
        if pixels_N3SS.shape[-1] != side:
            pixels_N3SS = F.interpolate(pixels_N3SS, (side, side), mode="bicubic", antialias=True)
        scale, shift = (pixels_N3SS.new_tensor(self.pixels[name])[:, None, None] for name in ("scale", "shift"))
        return (pixels_N3SS * scale + shift).to(old.dtype)

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


def special_tokens(model: VLM) -> int:
    """Visual tokens that stand for no place of the picture, where the connector keeps them."""
    return getattr(model.encoder, "special_tokens", 1) if getattr(model.middleware, "keep_special", False) else 0


def at_places(y_NTH: Tensor, count: int, special: int, wanted_special: int) -> Tensor:
    """Tokens of square pictures at the places of another grid, bilinearly: (N, count, H).

    Args:
        special, wanted_special: tokens before the places, here and there; where their numbers differ
            the mean of the places stands for each.

    Raises:
        ValueError: for places that form no square.
    """
    places_NTH, first_NTH = y_NTH[:, special:], y_NTH[:, :special]
    given, asked = places_NTH.shape[1], count - wanted_special
    if given != asked:
        side, wanted = round(given**0.5), round(asked**0.5)
        if side**2 != given or wanted**2 != asked:
            raise ValueError(f"the old and the new tower give {given} and {asked} places of a picture, which are no squares")
        grid_NHSS = places_NTH.mT.unflatten(2, (side, side))
        resized = F.interpolate(grid_NHSS, (wanted, wanted), mode="bilinear", align_corners=False, antialias=wanted < side)
        places_NTH = resized.flatten(2).mT
    if special != wanted_special:
        first_NTH = places_NTH.mean(dim=1, keepdim=True).expand(-1, wanted_special, -1)
    return torch.cat([first_NTH, places_NTH], dim=1)


def _tower(old: Mapping[str, Any], decoder_dim: int) -> VLM:
    """The old tower and connector, with fresh weights, frozen."""
    encoder = trusted_build(old["encoder"])
    middleware = completed_middleware(trusted_build, old["middleware"], encoder, decoder_dim=decoder_dim)
    return VLM(encoder, middleware).requires_grad_(False).eval()


def _connector_reads(model: VLM, pixels_N3SS: Tensor, inputs: dict[str, Any]) -> Tensor:
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
