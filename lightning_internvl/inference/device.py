"""The device and type that a finished model runs in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_internvl.config.model_source import ModelSource
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.model.vlm import VLM


def model_mover(settings: ModelSource) -> Callable[[VLM], VLM]:
    """What moves a model to `device` and `dtype` of the settings; attention is chosen.

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
    dtype = getattr(torch, settings.dtype)
    choose_backend("auto", device, dtype)
    return lambda model: model.to(device, dtype)
