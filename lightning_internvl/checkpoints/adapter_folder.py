"""A folder of adapters opened as a model: LoRA of PEFT (also as `export.py adapter=true` writes it)
and LLaVA's, put on the base that they name while it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_internvl.checkpoints.companion import named_folder
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.checkpoints.odd_files import ADAPTERS, LLAVA_WHOLE, adapter_advice, type_name
from lightning_internvl.checkpoints.weight_files import Shape, WeightFiles
from lightning_internvl.files import read_json

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # of PEFT's names
# settings of PEFT's LoRA that make other sums than W + s B A and DoRA's; what they have to be
PLAIN: Config = {
    "fan_in_fan_out": False, "lora_bias": False, "layer_replication": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None, "use_qalora": False, "target_parameters": None, "use_bdlora": None, "arrow_config": None,
    "monteclora_config": None, "kasa_config": None, "velora_config": None,
}  # fmt: skip
# first values of LoRA that leave other numbers in the base than it has
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
HALVES = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip


class Update(NamedTuple):
    """What an adapter adds to a weight W (O, I) or (O, I, K, K): scale * B A with A (R, I) and B
    (O, R); DoRA (Liu et al. 2024, section 4) then gives the rows of the sum the lengths that
    `magnitude` (O) holds. For a table of words (V, D) the sum is (B A)^T."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None
    table: bool

    @property
    def shape(self) -> Shape:
        """Of the weight."""
        shape = (self.b.shape[0], *self.a.shape[1:])
        return shape[::-1] if self.table else shape

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with the update, computed in float32."""
        a, b = (half.to(weight.device, torch.float32) for half in (self.a, self.b))
        delta = self.scale * (b.flatten(1) @ a.flatten(1))
        found = weight.float() + (delta.T if self.table else delta.reshape(weight.shape))
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(found, dim=0 if self.table else tuple(range(1, found.ndim)), keepdim=True)
            found = found * self.magnitude.to(found).reshape(norm.shape) / norm
        return found.to(weight.dtype)


class AdapterFolder:
    """Adapters, the tensors that were trained whole beside them, and where their base lies.

    Attributes:
        base: the folder of the base.

    Raises:
        ValueError: for another kind of adapters, or a base that is not named.
        Untrusted: for a base that is not on this machine.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.settings = place, read_json(place / ADAPTERS, {})
        if (kind := str(self.settings.get("peft_type") or "LORA")) != "LORA":
            raise ValueError(f"{place} holds adapters of the kind {kind}; {adapter_advice(kind)}")
        odd = [(field, value) for field, known in PLAIN.items() if (value := self.settings.get(field) or known) != known]
        first = self.settings.get("init_lora_weights")
        odd += [("init_lora_weights", first)] if str(first).lower().startswith(REWRITING) else []
        for field, value in odd:
            fault = f"{place} holds adapters with {field}={value!r}, which are not put together here"
            raise ValueError(f"{fault}; {adapter_advice('LORA')}")
        name = self.settings.get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{place} holds adapters that name no base; write it as base_model_name_or_path into {ADAPTERS}")
        self.base = named_folder(place, str(name), "base_model_name_or_path", "holds adapters without their base")

    def read(self) -> tuple[dict[str, Update], dict[str, Tensor]]:
        """Updates by the name of their weight in the base, and tensors that take the place of the
        base's or are not in it.

        Raises:
            ValueError: for halves that are not a pair.
        """
        file = next((self.place / name for name in FILES if (self.place / name).is_file()), None)
        if file is None:
            raise ValueError(f"{self.place} holds {ADAPTERS}, but none of {', '.join(FILES)}")
        halves: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for there, tensor in WeightFiles(file).tensors(torch.device("cpu")):
            name = there.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            layer, found, kind = name.partition(".lora_")
            if not found:
                whole[name] = tensor
            elif f"lora_{kind}" not in HALVES:
                raise ValueError(f"{self.place}: adapters of this kind cannot be put together: {name}")
            else:
                halves.setdefault(layer, {})[HALVES[f"lora_{kind}"]] = tensor
                halves[layer] |= {"table": tensor} if "embedding" in kind else {}
        if (more := self.place / LLAVA_WHOLE).is_file():
            whole |= {_plain(n): t for n, t in WeightFiles(more).tensors(torch.device("cpu"))}
        return {f"{layer}.weight": self._update(layer, found) for layer, found in halves.items()}, whole

    def _update(self, layer: str, found: Mapping[str, Tensor]) -> Update:
        if not {"a", "b"} <= found.keys():
            raise ValueError(f"{self.place}: the adapter of {layer} is no pair of lora_A and lora_B")
        if self.settings.get("use_dora") and "magnitude" not in found:
            raise ValueError(f"{self.place}: the adapter of {layer} lacks the lora_magnitude_vector of use_dora=true")
        return Update(found["a"], found["b"], self._scale(layer), found.get("magnitude"), "table" in found)

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
    """Whether a folder holds adapters.

    Raises:
        ValueError: if a whole model lies there too: which of them is meant nobody can tell.
    """
    if not (place / ADAPTERS).is_file():
        return False
    if whole := sorted(file.name for kind in ("model*.safetensors", "pytorch_model*.bin") for file in place.glob(kind)):
        raise ValueError(f"{place} holds adapters ({ADAPTERS}) and a whole model ({whole[0]}); move one of them away")
    return True


def _plain(name: str) -> str:
    """A name of LLaVA's file, whose prefixes depend on the release that wrote it."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def _of_pattern(pattern: Any, layer: str, usual: float) -> float:
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer):
            return value
    return usual
