"""A new tower in front of a finished model: the connector is solved in closed form, so that it gives
what the old tower and connector give for the same pictures at the same places.

Each linear layer of the connector is a ridge regression from what it reads to what the old
connector's layer gives there: first the first layer, which reads the new tower, then those behind it,
which start from their old weights and make up for what the layers before could not reach. That
features of towers that were trained apart are near a linear map from each other: model stitching
(Lenc and Vedaldi 2015, section 4; Bansal et al. 2021).

Letters: N squares, T visual tokens of a square, D width of what a layer reads, H width of what it
gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.compose import completed_middleware, trusted_build
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.solved_connector import SolvedConnector, chain_of, connector_reads, through


class TransplantStage(SolvedConnector):
    """Solves the connector of a model whose tower is another one now.

    Args:
        old: what is replaced, as `init_from` has it: `encoder` and `middleware` (configurations), and
            how its pixels come from those of the new tower: `image_size`, and `scale` and `shift` of
            the channels. Filled in.
        weights_of: a run, a hand-off, an official checkpoint or a hub id with the weights of the new
            tower; None for one that brings its own. Filled in.
        settings: of `SolvedConnector`.
    """

    def __init__(
        self, model: VLM, *, old: Mapping[str, Any] | None = None, weights_of: str | None = None, **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        assert old is not None  # `training.transplant` has filled it in
        self.pixels, self.weights_of = old, weights_of
        self.teacher = (_tower(old, model.decoder.dim),)

    def start_tensors(
        self, tensors: Mapping[str, Tensor], read: Callable[[str], Mapping[str, Tensor]]
    ) -> tuple[Mapping[str, Tensor], set[str]]:
        """The old tower and connector take their weights; the model gets the new tower's, and of the
        connector what stands behind its first linear layer."""
        for name, own in own_tensors(self.teacher[0]).items():
            own.copy_(self.of_start(tensors, name, "the old connector is made of"))
        first = chain_of(self.model.middleware)[: self.layers[0] + 1]
        fresh = {id(parameter) for module in first for parameter in module.parameters()}
        afresh = {name for name, parameter in self.model.named_parameters() if id(parameter) in fresh}
        kept = {name: x for name, x in tensors.items() if not name.startswith("encoder.") and name not in afresh}
        own_tower = read(self.weights_of) if self.weights_of else {}
        tower = {name: x for name, x in own_tower.items() if name.startswith("encoder.")}
        return kept | tower, set(tower)

    def wanted(self, pixels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the layer at work reads of the new tower, and what the old connector's layer gives there."""
        teacher, place = self.teacher[0].eval(), self.layers[self.number]
        own = {name: x for name, x in inputs.items() if name != "picture_keys"}
        reads = through(chain_of(self.model.middleware)[:place], connector_reads(self.model, pixels, inputs))
        target = through(chain_of(teacher.middleware)[: place + 1], connector_reads(teacher, self._as_before(pixels), own))
        target = at_places(target, reads.shape[1], special_tokens(teacher), special_tokens(self.model))
        return reads.flatten(0, -2), target.flatten(0, -2).float()

    def _as_before(self, pixels_N3SS: Tensor) -> Tensor:
        """Pixels as the old tower reads them: its size, and its mean and deviation of the channels."""
        side, old = self.pixels["image_size"], next(self.teacher[0].parameters())
        if pixels_N3SS.shape[-1] != side:
            pixels_N3SS = F.interpolate(pixels_N3SS, (side, side), mode="bicubic", antialias=True)
        scale, shift = (pixels_N3SS.new_tensor(self.pixels[name])[:, None, None] for name in ("scale", "shift"))
        return (pixels_N3SS * scale + shift).to(old.dtype)


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
