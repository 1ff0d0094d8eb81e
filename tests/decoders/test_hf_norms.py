"""RMSNorms of transformers: fused in a lower type, untouched in float32, and only where the formula is LLaMA's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.hf_norms import fuse_norms

QWEN2 = {
    "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
def test_fused_norms_are_transformers_own(kind: type[nn.Module]) -> None:
    norm, x = kind(16), torch.randn(2, 3, 16)
    nn.init.normal_(norm.weight)
    fused = nn.Sequential(copy.deepcopy(norm))
    fuse_norms(fused)
    assert fused(x).equal(norm(x))
    low = norm.bfloat16()(x.bfloat16())
    found = copy.deepcopy(fused)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, low, rtol=2e-2, atol=2e-2)


def test_norms_of_another_formula_stay() -> None:
    fused = nn.Sequential(GemmaRMSNorm(16))
    fuse_norms(fused)
    assert "forward" not in vars(fused[0])


def test_in_mixed_precision_all_states_of_a_decoder_are_in_the_lower_type() -> None:
    decoder, seen = HFCausalLM(config=QWEN2), []
    for block in decoder.sharding_units():
        block.register_forward_hook(lambda block, given, found: seen.append(found.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        states = decoder.hidden(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.long))
    assert {states.dtype, *seen} == {torch.bfloat16}
    assert decoder.hidden(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.long)).dtype == torch.float32
