"""A folder of adapters opened as a model: LoRA of PEFT (also as `export.py adapter=true` writes it)
and LLaVA's, put on the base that they name while it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.checkpoints.companion import named_folder
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.checkpoints.odd_files import ADAPTERS, LLAVA_WHOLE, type_name
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.files import read_json

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # of PEFT's names
PLAIN: Config = {
    "peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False,
    "layer_replication": None,
}  # fmt: skip


class AdapterFolder:
    """Adapters, the tensors that were trained whole beside them, and where their base lies.

    Attributes:
        base: the folder of the base.
        whole: tensors that take the place of the base's, or are not in it, by their names there.

    Raises:
        ValueError: for another kind of adapters, or a base that is not named.
        Untrusted: for a base that is not on this machine.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.settings = place, read_json(place / ADAPTERS, {})
        for field, known in PLAIN.items():
            if (value := self.settings.get(field) or known) != known:
                advice = "merge them into their base first (merge_and_unload of PEFT)"
                raise ValueError(f"{place} holds adapters with {field}={value!r}, which are not put together here; {advice}")
        name = self.settings.get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{place} holds adapters that name no base; write it as base_model_name_or_path into {ADAPTERS}")
        self.base = named_folder(place, str(name), "base_model_name_or_path", "holds adapters without their base")
        file = next((place / name for name in FILES if (place / name).is_file()), None)
        if file is None:
            raise ValueError(f"{place} holds {ADAPTERS}, but none of {', '.join(FILES)}")
        found = {
            n.removeprefix(PREFIX).replace(".modules_to_save.", "."): t for n, t in WeightFiles(file).tensors(torch.device("cpu"))
        }
        self.halves = {n: t for n, t in found.items() if ".lora_" in n}
        self.whole = {n: t for n, t in found.items() if ".lora_" not in n}
        if (more := place / LLAVA_WHOLE).is_file():
            self.whole |= {_plain(n): t for n, t in WeightFiles(more).tensors(torch.device("cpu"))}

    def updates(self, canonical: Callable[[str], str | None]) -> dict[str, tuple[Tensor, Tensor, float]]:
        """A, B and their scale by the canonical name of the weight.

        Raises:
            ValueError: for halves that are not a pair of a linear layer.
        """
        found: dict[str, tuple[Tensor, Tensor, float]] = {}
        layers = {name.rpartition(".lora_")[0] for name in self.halves}
        for layer in sorted(layers):
            pair = [self.halves.pop(f"{layer}.lora_{half}.weight", None) for half in "AB"]
            if pair[0] is None or pair[1] is None:
                raise ValueError(f"{self.place}: the adapter of {layer} is no pair of lora_A and lora_B")
            found[str(canonical(f"{layer}.weight"))] = (pair[0], pair[1], self._scale(layer))
        if self.halves:
            raise ValueError(f"{self.place}: adapters of this kind cannot be put together: {next(iter(self.halves))}")
        return found

    def _scale(self, layer: str) -> float:
        rank = _of_pattern(self.settings.get("rank_pattern"), layer, self.settings.get("r", 8))
        alpha = _of_pattern(self.settings.get("alpha_pattern"), layer, self.settings.get("lora_alpha", 8))
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)


class WholeTensors:
    """Tensors of an adapter folder, read as weight files are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.held = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.types = {name: type_name(tensor.dtype) for name, tensor in tensors.items()}

    def tensors(self, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """As `WeightFiles.tensors`."""
        for name, tensor in self.held.items():
            yield name, tensor.to(device, dtype if tensor.is_floating_point() else None)


def is_adapter_folder(place: Path) -> bool:
    """Whether a folder holds adapters and no whole model."""
    return (
        (place / ADAPTERS).is_file() and not any(place.glob("model*.safetensors")) and not any(place.glob("pytorch_model*.bin"))
    )


def updated(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, computed in float32."""
    a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32)
    return (weight.float() + scale * (b @ a)).to(weight.dtype)


def _plain(name: str) -> str:
    """A name of LLaVA's file, whose prefixes depend on the release that wrote it."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def _of_pattern(pattern: Any, layer: str, usual: float) -> float:
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer):
            return value
    return usual
