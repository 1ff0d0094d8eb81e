"""Experts stand in no linear layer: the start of training says what adapters and quantisation leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers.peft import add_adapters
from lightning_internvl.layers.quantization import quantize
from lightning_internvl.layers.stacked_weights import stacked_weights, unreached

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 50, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LORA = {"method": "lora", "rank": 2, "alpha": 2.0, "dropout": 0.0, "targets": "blocks"}


def model_of(kind: str) -> nn.ModuleDict:
    return nn.ModuleDict({"decoder": HFCausalLM(config={"model_type": kind, **SIZES, **KINDS[kind]})})


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("bits", [None, "nf4", "int8"])
def test_experts_are_told_with_their_share(kind: str, bits: str | None) -> None:
    model, settings = model_of(kind), {"peft": {"decoder": LORA}, "quantization": {"decoder": bits}}
    add_adapters(model, settings["peft"])
    (line,) = unreached(model, settings, ())
    held = {n: p for n, p in model.named_parameters() if ".experts." in n or "mlp.gate." in n or "router.weight" in n}
    experts = sum(p.numel() for p in held.values())
    methods = "lora reaches" if bits is None else f"lora and {bits} reach"
    assert line.startswith(f"decoder: {methods} linear layers; lm.model.layers.*.mlp.")
    assert "mlp.experts.gate_up_proj" in line
    assert f": {experts:,} of " in line


def test_what_trains_whole_is_not_told() -> None:
    model, settings = model_of("qwen3_moe"), {"peft": {"decoder": LORA}, "quantization": {}}
    trained = [f"decoder.{name}" for name in stacked_weights(model["decoder"])]
    assert len(trained) == 6  # router, gate and up, down of two blocks
    assert unreached(model, settings, trained) == []


def test_nothing_is_told_of_a_model_without_experts_or_methods() -> None:
    assert unreached(model_of("llama"), {"peft": {"decoder": LORA}, "quantization": {"decoder": "nf4"}}, ()) == []
    assert unreached(model_of("qwen3_moe"), {"peft": {"decoder": None}, "quantization": None}, ()) == []


@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16"])
def test_quantisation_leaves_them_as_they_are(bits: str) -> None:
    model = model_of("gpt_oss")
    before = {name: dict(model.named_parameters())[f"decoder.{name}"] for name in stacked_weights(model["decoder"])}
    quantize(model, {"decoder": bits})
    after = dict(model.named_parameters())
    assert all(after[f"decoder.{name}"] is tensor and tensor.dtype == torch.float32 for name, tensor in before.items())
