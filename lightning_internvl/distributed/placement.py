"""Where a trainer computes and in which type, as its settings say, before there is a trainer."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch

# Beginnings of the names of Lightning's precisions, and the type of their matrix products.
_TYPES = {
    "bf16": torch.bfloat16,
    "16": torch.float16,
    "64": torch.float64,
    "transformer-engine-float16": torch.float16,
    "transformer-engine": torch.bfloat16,
}


class Hardware(Protocol):
    """What is read of the settings of a trainer."""

    @property
    def accelerator(self) -> str: ...
    @property
    def devices(self) -> Any: ...
    @property
    def precision(self) -> Any: ...


def place_of(trainer: Hardware) -> tuple[torch.device, torch.dtype]:
    """The device of this process and the type of matrix products, for settings of a trainer."""
    return device_of(trainer.accelerator, trainer.devices), computes_in(trainer.precision)


def device_of(accelerator: str, devices: Any) -> torch.device:
    """The device that Lightning gives to this process, by these settings of its trainer."""
    if accelerator in ("auto", "gpu"):  # Lightning looks for them in this order
        available = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
        accelerator = next((kind for kind, found in available.items() if found), "cpu")
    if accelerator != "cuda":
        return torch.device("mps" if accelerator == "mps" else "cpu")
    place = _local_rank()
    return torch.device("cuda", devices[place] if isinstance(devices, list) and place < len(devices) else place)


def check_type(device: torch.device, dtype: torch.dtype, precision: str | int | None) -> None:
    """Refuse bfloat16 on a GPU without it, where PyTorch would compute it many times slower than
    float32.

    Raises:
        ValueError: with what the GPU has.
    """
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.version.hip is not None:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        given = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and bfloat16 begins with 8.0"
        raise ValueError(f"trainer.precision={precision}: {given}; use trainer.precision=16-mixed or 32-true")


def set_products(matmul_precision: str, device: torch.device) -> None:
    """How exactly matrices of float32 are multiplied from now on; only a GPU has a choice."""
    torch.set_float32_matmul_precision(matmul_precision if device.type == "cuda" else "highest")


def _local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def computes_in(precision: str | int | None) -> torch.dtype:
    """The type of matrix products under a precision of Lightning: bfloat16 for bf16-*."""
    fitting = (dtype for name, dtype in _TYPES.items() if str(precision).startswith(name))
    return next(fitting, torch.float32)
