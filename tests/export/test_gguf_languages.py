"""Language models in GGUF files: what is unfused, stacked, shifted or added, and settings that llama.cpp does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_internvl.export.gguf_fields import language_faults, write_language_fields
from lightning_internvl.export.gguf_tensors import LANGUAGES, language_tensors

gguf = pytest.importorskip("gguf", reason="needs requirements-gguf.txt")
HEADS, GROUPS, SIZE, WIDTH = 4, 2, 6, 24
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
}  # fmt: skip
LAYER = "language_model.model.layers.1"


def text_of(language: str, **fields: Any) -> dict[str, Any]:
    return SIZES | {"architectures": [language]} | fields


def made(text: dict[str, Any], held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by name, as they are made of those that are held."""
    return {found.name: found.change(*(held[name] for name in found.sources)) for found in language_tensors(text, held)}


def test_fused_queries_keys_and_values_are_those_of_a_llama() -> None:
    queries, keys, values = (torch.randn(heads * SIZE, WIDTH) for heads in (HEADS, GROUPS, GROUPS))
    grouped = [rows.reshape(GROUPS, -1, WIDTH) for rows in (queries, keys, values)]  # of a group one after another
    fused = {f"{LAYER}.attention.wqkv.weight": torch.cat(grouped, dim=1).reshape(-1, WIDTH)}
    plain = {f"{LAYER}.self_attn.{side}_proj.weight": rows for side, rows in zip("qkv", (queries, keys, values), strict=True)}
    theirs = {
        "tok_embeddings": "embed_tokens", "layers.1.attention.wo": "layers.1.self_attn.o_proj",
        "layers.1.feed_forward.w1": "layers.1.mlp.gate_proj", "layers.1.feed_forward.w2": "layers.1.mlp.down_proj",
        "layers.1.feed_forward.w3": "layers.1.mlp.up_proj", "layers.1.attention_norm": "layers.1.input_layernorm",
        "layers.1.ffn_norm": "layers.1.post_attention_layernorm", "norm": "norm",
    }  # fmt: skip
    for official, llama in theirs.items():
        fused[f"language_model.model.{official}.weight"] = plain[f"language_model.model.{llama}.weight"] = torch.randn(3)
    fused["language_model.output.weight"] = plain["language_model.lm_head.weight"] = torch.randn(3)
    ours, wanted = made(text_of("InternLM2ForCausalLM"), fused), made(text_of("LlamaForCausalLM"), plain)
    assert ours.keys() == wanted.keys()
    assert len(ours) == len(theirs) + 4
    assert all(ours[name].equal(wanted[name]) for name in ours)


def test_experts_are_stacked_in_the_order_of_their_numbers() -> None:
    names = {f"{LAYER}.mlp.experts.{number}.up_proj.weight": torch.full((2, 3), float(number)) for number in (10, 2, 0, 11, 1)}
    names |= {f"{LAYER}.mlp.gate.weight": torch.randn(5, 3)}
    found = made(text_of("Qwen3MoeForCausalLM"), names)
    assert found.keys() == {"blk.1.ffn_up_exps.weight", "blk.1.ffn_gate_inp.weight"}
    assert found["blk.1.ffn_up_exps.weight"][:, 0, 0].tolist() == [0, 1, 2, 10, 11]


def test_norms_of_gemma_are_whole_and_its_table_stands_once() -> None:
    norm = torch.tensor([0.1234], dtype=torch.bfloat16)
    held = {f"{LAYER}.self_attn.q_norm.weight": norm, "language_model.lm_head.weight": norm}
    found = made(text_of("Gemma3ForCausalLM"), held)
    assert found.keys() == {"blk.1.attn_q_norm.weight"}
    assert found["blk.1.attn_q_norm.weight"].equal(norm.float() + 1)  # not rounded again


def fields_of(text: dict[str, Any], folder: Path) -> dict[str, Any]:
    architecture = LANGUAGES[text["architectures"][0]]
    writer = gguf.GGUFWriter(folder / "m.gguf", architecture)
    write_language_fields(writer, text, rows=9)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    held = gguf.GGUFReader(folder / "m.gguf").fields
    return {name.removeprefix(f"{architecture}."): field.contents() for name, field in held.items()}


def test_phi3_made_for_longer_texts(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 2.0, 3.0], "long_factor": [4.0, 5.0, 6.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    text = text_of("Phi3ForCausalLM", rope_parameters=rope, sliding_window=None)
    assert language_faults("phi3", text) == []
    found = made(text, {f"{LAYER}.self_attn.qkv_proj.weight": torch.eye(3)})
    assert found["blk.1.attn_qkv.weight"].equal(torch.eye(3))
    assert found["rope_factors_long.weight"].tolist() == factors["long_factor"]
    assert found["rope_factors_short.weight"].tolist() == factors["short_factor"]
    fields = fields_of(text, tmp_path)
    assert (fields["rope.scaling.original_context_length"], fields["rope.dimension_count"]) == (64, SIZE)
    assert fields["attention.sliding_window"] == 0
    assert fields["rope.scaling.attn_factor"] == pytest.approx((1 + 1 / 3) ** 0.5)  # log 4 / log 64


def test_fields_of_experts_and_of_gemma(tmp_path: Path) -> None:
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
    fields = fields_of(text_of("Qwen3MoeForCausalLM", **experts), tmp_path)
    assert [fields[name] for name in ("expert_count", "expert_used_count", "expert_feed_forward_length")] == [5, 2, 7]
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    fields = fields_of(text_of("Gemma3ForCausalLM", head_dim=8, sliding_window=16, rope_parameters=rope), tmp_path)
    assert (fields["rope.freq_base"], fields["attention.sliding_window"], fields["attention.key_length"]) == (1e6, 16, 8)


GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "hidden_activation": "gelu_pytorch_tanh"}


@pytest.mark.parametrize(("architecture", "usual", "change", "named"), [
    ("llama", {"sliding_window": 256}, {"sliding_window": 100}, "sliding_window=100"),
    ("qwen3moe", {"norm_topk_prob": True}, {"norm_topk_prob": False}, "norm_topk_prob=False: llama.cpp has True"),
    ("qwen3moe", {"norm_topk_prob": True}, {"mlp_only_layers": [1]}, "mlp_only_layers=[1]: llama.cpp has []"),
    ("gemma3", GEMMA, {"query_pre_attn_scalar": 4}, "query_pre_attn_scalar=4: llama.cpp has 8"),
    ("gemma3", GEMMA, {"layer_types": ["full_attention"] * 2}, "layer_types="),
    ("gemma3", GEMMA, {"rope_local_base_freq": 5.0}, "rope_local_base_freq=5.0: llama.cpp has 10000.0"),
    ("gemma3", GEMMA, {"hidden_activation": "silu"}, "hidden_act=silu is not gelu_pytorch_tanh"),
])  # fmt: skip
def test_a_setting_that_llama_cpp_has_otherwise(architecture: str, usual: Any, change: Any, named: str) -> None:
    assert language_faults(architecture, SIZES | usual) == []
    (fault,) = language_faults(architecture, SIZES | usual | change)
    assert named in fault
