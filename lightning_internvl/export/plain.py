"""A trained model as a plain one: adapters added, quantised weights as their values."""

from __future__ import annotations

import torch
from torch import nn

from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.layers import peft
from lightning_internvl.layers.quantization import dequantized_weight, is_quantized, plain_experts, plain_linear
from lightning_internvl.layers.quantized_layers import Bf16Linear, Int8Head
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import first_of
from lightning_internvl.model.vlm import VLM


def make_plain(model: VLM) -> None:
    """Leave no adapter and no quantised weight in a model, in place.

    Raises:
        ValueError: if that lost any tensor but those of adapters.
    """
    before = own_tensors(model)
    peft.merge(model)
    dequantize(model)
    left = own_tensors(model)
    if gone := [name for name in before if name not in left and not peft.is_update(name)]:
        raise ValueError(f"merging the adapters lost {len(gone)} tensors: {first_of(gone, 20)}")


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Plain layers in place of quantised ones."""
    for part in model.children():
        if hasattr(part, "lm"):
            _plain_tables(part.lm)
        plain_experts(part)
        for name, layer in list(part.named_modules()):
            if is_quantized(layer):
                part.set_submodule(name, plain_linear(layer, dequantized_weight(layer)))


def _plain_tables(lm: nn.Module) -> None:
    """Token embeddings and output layer, one parameter where they shared a quantised one."""
    words, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    shared = head.table is None if isinstance(head, Int8Head) else head is not None and head.weight is words.weight
    if is_quantized(words):
        table = nn.Embedding(words.num_embeddings, words.embedding_dim, device="meta")
        table.weight = nn.Parameter(dequantized_weight(words), requires_grad=False)
        lm.set_input_embeddings(table)
    if isinstance(head, Int8Head | Bf16Linear):
        lm.set_output_embeddings(plain_linear(head, table.weight if shared else dequantized_weight(head)))


def plain_config(config: Config) -> Config:
    """The configuration of the parts of a model after `make_plain`."""
    return {key: value for key, value in config.items() if key not in ("peft", "quantization")}
