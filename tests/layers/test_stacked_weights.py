"""The start of training says what adapters and quantisation leave: experts, for some methods, and routers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers import stacked_weights as lines
from lightning_internvl.layers.peft import add_adapters
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
@pytest.mark.parametrize(("method", "bits", "told"), [
    ("lora", None, []), ("lora", "nf4", []), ("lora", "bf16", []),
    ("lora", "int8", ["int8"]), ("dora", "nf4", ["dora"]),
])  # fmt: skip
def test_what_reaches_no_experts_is_told_with_their_share(
    kind: str, method: str, bits: str | None, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LEAST", 0.1)  # the router of so small a model is more than a hundredth
    model = model_of(kind)
    settings = {"peft": {"decoder": LORA | {"method": method}}, "quantization": {"decoder": bits}}
    experts = stacked_weights(model["decoder"])
    add_adapters(model, settings["peft"])
    assert stacked_weights(model["decoder"]) == experts
    found = unreached(model, settings, ())
    assert [line.split()[1] for line in found] == told
    assert all("lm.model.layers.*.mlp.experts.gate_up_proj" in line for line in found)
    assert all(f": {sum(experts.values()):,} of " in line for line in found)


def test_what_trains_whole_is_not_told() -> None:
    model, settings = model_of("qwen3_moe"), {"peft": {"decoder": LORA | {"method": "dora"}}, "quantization": {}}
    trained = [f"decoder.{name}" for name in stacked_weights(model["decoder"])]
    assert len(trained) == 6  # router, gate and up, down of two blocks
    assert unreached(model, settings, trained) == []


def test_nothing_is_told_of_a_model_without_experts_or_methods() -> None:
    assert unreached(model_of("llama"), {"peft": {"decoder": LORA}, "quantization": {"decoder": "nf4"}}, ()) == []
    assert unreached(model_of("qwen3_moe"), {"peft": {"decoder": None}, "quantization": None}, ()) == []
