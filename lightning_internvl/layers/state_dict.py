"""The tensors of a model that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor, nn

from lightning_internvl.layers.peft import is_update, plain_name
from lightning_internvl.layers.quantization import dequantized_weight, quantized_layers


def own_tensors(model: nn.Module, without: Container[str] = ()) -> dict[str, Tensor]:
    """A model's tensors by name; one that stands in several places (tied embeddings) once, under
    its first name. Quantised weights count as what they stand for.

    Args:
        without: names that are not wanted, and so not brought back from their quantised form.
    """
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    plain = {name: tensor.detach() for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}
    for name, layer in quantized_layers(model).items():
        start = plain_name(f"{name}.")
        whole = plain_name(f"{name}.weight")
        packed = [k for k in plain if (k.startswith(start) or k == whole) and k != f"{start}bias" and not is_update(k)]
        for key in packed:
            del plain[key]
        if packed and whole not in without:
            plain[whole] = dequantized_weight(layer)
    return {name: tensor for name, tensor in plain.items() if name not in without}
