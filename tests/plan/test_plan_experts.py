"""A plan of a model with experts: work by those that a token meets, memory by all."""

from __future__ import annotations

import torch

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers.attention import choose_backend, keep_backend
from lightning_internvl.plan.kernels import Kernels, Unfilled
from lightning_internvl.plan.meter import Meter

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 50, "pad_token_id": 0, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip


def flops(kind: str, **fields: int) -> tuple[int, int]:
    """Of a forward and a backward pass of 10 tokens."""
    with torch.device("meta"), Unfilled():
        decoder = HFCausalLM(config={"model_type": kind, **SIZES, **fields})
    meter = Meter()
    embeds = torch.empty(2, 5, 32, device="meta", requires_grad=True)
    with torch.device("meta"), meter.scope() as tally, Kernels(), meter:
        hidden = decoder.hidden(embeds, torch.ones(2, 5, dtype=torch.long))
        meter.backward(hidden.sum().backward)
    return tally.forward.total(), tally.backward.total()


def test_experts_that_no_token_meets_cost_no_work() -> None:
    one, two = flops("qwen3_moe", num_experts=4), flops("qwen3_moe", num_experts=8)
    router = 2 * 10 * 32 * 4  # the only work that grows with the number of experts
    assert (two[0] - one[0], two[1] - one[1]) == (router, 2 * router)


def test_two_experts_of_half_the_width_are_as_much_work_as_one_plain_block() -> None:
    plain, experts = flops("qwen3", intermediate_size=32), flops("qwen3_moe", num_experts=4)
    router = 2 * 10 * 32 * 4
    assert experts == (plain[0] + router, plain[1] + 2 * router)


def test_attention_with_sinks_is_planned_as_it_computes() -> None:
    with keep_backend():
        choose_backend("sdpa")  # as a plan does; no other attention has them
        forward, backward = flops("gpt_oss", num_local_experts=4, intermediate_size=32)
    projections, experts = 2 * 10 * 32 * (32 + 16 + 16 + 32), 2 * 10 * 2 * 3 * 32 * 32
    router, scores = 2 * 10 * 32 * 4, 2 * 2 * 2 * 4 * 5 * 5 * 8  # of all pairs in each row of 5
    assert forward == projections + experts + router + scores
    assert backward == 2 * forward
