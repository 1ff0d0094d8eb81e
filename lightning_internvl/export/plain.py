"""A trained model as a plain one: adapters added to their weights, quantised weights as what they stand for."""

from __future__ import annotations

import torch
from torch import nn

from lightning_internvl import peft
from lightning_internvl.checkpoints.adapters import Config
from lightning_internvl.checkpoints.files import listed, own_tensors
from lightning_internvl.model import VLM
from lightning_internvl.quantization import Int8Table, dequantized, is_quantized


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
        raise ValueError(f"merging the adapters lost {len(gone)} tensors: {listed(gone)}")


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Plain layers in place of quantised ones."""
    for part in model.children():
        if isinstance(words := part.lm.get_input_embeddings() if hasattr(part, "lm") else None, Int8Table):
            _plain_embeddings(part.lm, words)
        for name, layer in list(part.named_modules()):
            if is_quantized(layer):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
                plain.weight, plain.bias = _frozen(dequantized(layer)), layer.bias
                plain._forward_hooks.update(layer._forward_hooks)
                part.set_submodule(name, plain.train(layer.training))


def _plain_embeddings(lm: nn.Module, words: Int8Table) -> None:
    table, head = nn.Embedding(*words.weight.shape, device="meta"), lm.get_output_embeddings()
    table.weight = _frozen(words.weight)
    lm.set_input_embeddings(table)
    if head is not None:
        plain = nn.Linear(table.embedding_dim, table.num_embeddings, bias=head.bias is not None, device="meta")
        plain.weight = table.weight if getattr(head, "table", None) is None else _frozen(head.weight)
        plain.bias = head.bias
        lm.set_output_embeddings(plain)


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def plain_config(config: Config) -> Config:
    """The configuration of the parts of a model after `make_plain`."""
    return {key: value for key, value in config.items() if key not in ("peft", "quantization")}
