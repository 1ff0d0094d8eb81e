"""The device and type that a finished model runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_internvl.config.model_source import ModelSource
from lightning_internvl.distributed.placement import computes_in, set_products
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.model.vlm import VLM


class Place(NamedTuple):
    """Where a model runs: its device, the type of its weights, and the lower type of its products
    under automatic mixed precision; None: that of the weights."""

    device: torch.device
    dtype: torch.dtype
    products: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The types, for records."""
        names = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.products) if dtype)
        return " with products in ".join(names)

    def put(self, model: VLM) -> VLM:
        """Move a model there."""
        return model.to(self.device, self.dtype)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which the model runs."""
        return torch.autocast(self.device.type, self.products) if self.products else nullcontext()


def on_device(model: VLM, tensor: Tensor) -> Tensor:
    """A tensor where the model is; numbers with a fraction in the type of its first weights."""
    weight = next(model.parameters())
    return tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else None)


def place_for(settings: ModelSource, trained_in: str | int | None = None) -> Place:
    """The place that settings ask for; attention is chosen for it.

    Args:
        trained_in: the precision of the trainer that trained the model, which `dtype: auto` takes
            on a GPU that has it.

    Raises:
        ValueError: for a device that is not here.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        choices = "auto, cpu, cuda, cuda:1 and so on"
        raise ValueError(f"device={name!r} is not known; valid choices: {choices}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: no GPU is seen here; leave it out or give device=cpu")
    place = Place(device, torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype))
    lower = computes_in(trained_in)
    if settings.dtype == "auto" and device.type == "cuda" and _has(lower):
        place = place._replace(products=lower)
    set_products(settings.matmul_precision, device)
    choose_backend("auto", device, place.products or place.dtype)
    return place


def _has(dtype: torch.dtype) -> bool:
    """Whether a GPU multiplies in this lower type."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False))
