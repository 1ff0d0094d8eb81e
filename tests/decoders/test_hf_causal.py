"""A Hugging Face language model as the decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.protocols import Decoder

LLAMA = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip


@pytest.fixture
def decoder() -> HFCausalLM:
    return HFCausalLM(config=LLAMA).eval()


def test_states_and_head_are_the_model_in_two_steps(decoder: HFCausalLM) -> None:
    assert isinstance(decoder, Decoder)
    ids, mask = torch.randint(3, 23, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    hidden = decoder.hidden(decoder.embed(ids), mask)
    assert hidden.shape == (2, 6, decoder.dim) == (2, 6, 16)
    torch.testing.assert_close(decoder.head(hidden), decoder.lm(input_ids=ids, attention_mask=mask).logits)
    assert decoder.head(hidden.bfloat16().float()).dtype == torch.float32


def test_generation_returns_new_tokens_and_ignores_padding_on_the_left(decoder: HFCausalLM) -> None:
    ids = torch.tensor([[5, 9, 4]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = decoder.generate(decoder.embed(ids), torch.ones_like(ids), **options)
    assert alone.shape == (1, 6)
    grown = ids
    for _ in range(6):
        logits = decoder.head(decoder.hidden(decoder.embed(grown), torch.ones_like(grown)))[:, -1]
        logits[:, 2] = -torch.inf
        grown = torch.cat([grown, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert alone.equal(grown[:, 3:])
    padded = torch.tensor([[pad, pad, 5, 9, 4] for pad in range(3, 23)])  # what stands in the padding must not matter
    mask = torch.tensor([[0, 0, 1, 1, 1]]).expand(20, -1)
    assert decoder.generate(decoder.embed(padded), mask, **options).equal(alone.expand(20, -1))
    assert not decoder.generate(decoder.embed(padded), torch.ones_like(mask), **options).equal(alone.expand(20, -1))


def test_sharding_units_are_the_blocks(decoder: HFCausalLM) -> None:
    assert decoder.sharding_units() == list(decoder.lm.model.layers)


def test_the_vocabulary_follows_the_tokenizer() -> None:
    decoder = HFCausalLM(config=LLAMA, vocab_size=40)
    assert decoder.embed(torch.tensor([[39]])).shape == (1, 1, 16)
    assert decoder.head(torch.zeros(1, 16)).shape == (1, 40)


def test_pretrained_weights_are_loaded_and_their_table_grows(decoder: HFCausalLM, tmp_path: Path) -> None:
    decoder.lm.save_pretrained(tmp_path)
    same = HFCausalLM(pretrained=str(tmp_path))
    assert all(a.equal(b) for a, b in zip(same.parameters(), decoder.parameters(), strict=True))
    grown = HFCausalLM(pretrained=str(tmp_path), vocab_size=30)
    assert grown.lm.get_input_embeddings().weight[:23].equal(decoder.lm.get_input_embeddings().weight)
    assert grown.head(torch.zeros(1, 16)).shape == (1, 30)
    kept = HFCausalLM(pretrained=str(tmp_path), vocab_size=10)
    assert kept.lm.get_input_embeddings().num_embeddings == 23


@pytest.mark.parametrize("tied", [True, False])
def test_new_words_start_as_the_mean_of_the_old_ones(tied: bool, tmp_path: Path) -> None:
    HFCausalLM(config=LLAMA | {"tie_word_embeddings": tied}).lm.save_pretrained(tmp_path)
    grown, again = (HFCausalLM(pretrained=str(tmp_path), vocab_size=30) for _ in range(2))
    assert grown.tied is tied
    tables = [grown.lm.get_input_embeddings().weight, grown.lm.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) is tied
    for table, other in zip(
        tables, (again.lm.get_input_embeddings().weight, again.lm.get_output_embeddings().weight), strict=True
    ):
        assert table[23:].equal(table[:23].mean(dim=0).expand(7, -1))
        assert table.equal(other)
        assert table.requires_grad


def test_one_table_of_a_file_becomes_two_if_asked(tmp_path: Path) -> None:
    one = HFCausalLM(config=LLAMA | {"tie_word_embeddings": True})
    one.lm.save_pretrained(tmp_path / "one")
    two = HFCausalLM(pretrained=str(tmp_path / "one"), config={"tie_word_embeddings": False})
    words, output = two.lm.get_input_embeddings().weight, two.lm.get_output_embeddings().weight
    assert not two.tied
    assert words is not output
    assert words.equal(output)
    output.data.zero_()
    assert words.equal(one.lm.get_input_embeddings().weight)
    two.lm.save_pretrained(tmp_path / "two")
    again = HFCausalLM(pretrained=str(tmp_path / "two"), config={"tie_word_embeddings": False})
    assert not again.lm.get_output_embeddings().weight.any()
    assert again.lm.get_input_embeddings().weight.equal(words)


def test_the_table_is_rounded_up_only_if_asked(tmp_path: Path) -> None:
    HFCausalLM(config=LLAMA).lm.save_pretrained(tmp_path)
    rounded = HFCausalLM(pretrained=str(tmp_path), vocab_size=30, vocab_multiple=16)
    assert rounded.vocab_size == 32
    table = rounded.lm.get_input_embeddings().weight
    assert table[23:].equal(table[:23].mean(dim=0).expand(9, -1))
    assert HFCausalLM(pretrained=str(tmp_path), vocab_size=23, vocab_multiple=16).vocab_size == 23


def test_the_same_architecture_is_built_without_the_checkpoint(tmp_path: Path) -> None:
    HFCausalLM(config=LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True}).lm.save_pretrained(tmp_path)
    settings = {"pretrained": str(tmp_path), "vocab_size": 30}
    decoder = HFCausalLM(**settings).eval()
    settings |= json.loads(json.dumps(decoder.without_source))
    assert settings["pretrained"] is None
    assert settings["config"]["model_type"] == "llama"
    again = HFCausalLM(**settings).eval()
    again.load_state_dict(decoder.state_dict())
    ids = torch.randint(0, 30, (2, 5))
    assert again.tied
    assert again.lm(ids).logits.equal(decoder.lm(ids).logits)


def test_on_the_meta_device_a_config_is_enough(tmp_path: Path) -> None:
    with torch.device("meta"):
        assert HFCausalLM(pretrained="owner/elsewhere", config=LLAMA, vocab_size=30).vocab_size == 30
        HFCausalLM(config=LLAMA).lm.config.save_pretrained(tmp_path)
        assert HFCausalLM(pretrained=str(tmp_path), vocab_size=30).vocab_size == 30


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    lm = HFCausalLM(config=LLAMA).lm
    lm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decoder\.pretrained=.* cannot be loaded with model_type, vocab_size"):
        HFCausalLM(pretrained=str(tmp_path), config={"model_type": "llama", "vocab_size": 40})
    lm.save_pretrained(tmp_path, state_dict={k: v for k, v in lm.state_dict().items() if "layers.1.mlp" not in k})
    with pytest.raises(ValueError, match=r"lacks tensors of a LlamaForCausalLM: model\.layers\.1\.mlp\.down_proj\.weight"):
        HFCausalLM(pretrained=str(tmp_path))


def test_something_to_build_from_is_needed() -> None:
    with pytest.raises(ValueError, match="either `pretrained`"):
        HFCausalLM()


@pytest.mark.parametrize("kind", ["llama", "opt", "mistral", "gemma2"])
def test_padding_behind_the_tokens_needs_no_look_at_a_mask(kind: str) -> None:
    """With a sliding window neither; a model that must look, here for its soft caps, does."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40}
    own = {"opt": {"ffn_dim": 16, "word_embed_proj_dim": 16}, "mistral": {"sliding_window": 3}, "gemma2": {"head_dim": 8}}
    eager = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    fields = {"model_type": kind, "intermediate_size": 16, "max_position_embeddings": 32, **sizes, **own.get(kind, {}), **eager}
    decoder = HFCausalLM(config=fields).eval()
    states, mask = torch.randn(2, 7, 16), (torch.arange(7) < torch.tensor([[7], [4]])).long()
    expected = decoder.hidden(states, mask)[mask.bool()]
    unread = mask if eager else torch.zeros_like(mask)
    assert torch.equal(decoder.hidden(states, unread, right_padded=True)[mask.bool()], expected)


@pytest.mark.parametrize("length", [12, 40], ids=["short factors", "long factors"])
def test_the_first_name_of_longrope_is_known(length: int) -> None:
    factors = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.5, 3.0, 6.0, 9.0]}
    sizes = LLAMA | {"model_type": "phi3", "num_key_value_heads": 2}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config = sizes | lengths | {"rope_scaling": {"type": "su", **factors}}  # as in Phi-3-mini-128k of April 2024
    decoder = HFCausalLM(config=config).eval()
    fields = {k: v for k, v in config.items() if k != "model_type"} | {"rope_scaling": {"type": "longrope", **factors}}
    theirs = Phi3ForCausalLM(Phi3Config(**fields)).eval()
    theirs.load_state_dict(decoder.lm.state_dict())
    ids, mask = torch.randint(3, 23, (2, length)), torch.ones(2, length, dtype=torch.long)
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(decoder.head(decoder.hidden(decoder.embed(ids), mask)), expected)
    plain = HFCausalLM(config=sizes | lengths).eval()
    plain.lm.load_state_dict(decoder.lm.state_dict())
    assert not torch.allclose(plain.head(plain.hidden(plain.embed(ids), mask)), expected, atol=1e-3)
    assert HFCausalLM(config=decoder.plain_config).lm.config.rope_parameters == decoder.lm.config.rope_parameters


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_the_attention_that_a_folder_asks_for_is_not_taken(decoder: HFCausalLM, tmp_path: Path, field: str) -> None:
    decoder.lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: "flash_attention_2"}))
    assert HFCausalLM(pretrained=str(tmp_path)).lm.config._attn_implementation == "sdpa"
    asked = HFCausalLM(pretrained=str(tmp_path), config={"attn_implementation": "eager"})
    assert asked.lm.config._attn_implementation == "eager"
    with torch.device("meta"):
        assert HFCausalLM(pretrained=str(tmp_path)).lm.config._attn_implementation == "sdpa"


def test_a_loss_of_the_router_is_not_promised(tmp_path: Path) -> None:
    experts = {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config = LLAMA | experts | {"num_key_value_heads": 2}
    with pytest.raises(ValueError, match="output_router_logits=true has no effect"):
        HFCausalLM(config=config | {"output_router_logits": True})
    decoder = HFCausalLM(config=config)
    decoder.lm.config.output_router_logits = True
    decoder.lm.save_pretrained(tmp_path)
    assert HFCausalLM(pretrained=str(tmp_path)).lm.config.output_router_logits is False


def test_keys_may_start_as_queries() -> None:
    for equal in (True, False):
        layers = HFCausalLM(config=LLAMA, keys_start_as_queries=equal).lm.model.layers
        assert [layer.self_attn.q_proj.weight.equal(layer.self_attn.k_proj.weight) for layer in layers] == [equal] * 2
    with pytest.raises(ValueError, match="as many key as query heads"):
        HFCausalLM(config=LLAMA | {"num_key_value_heads": 1}, keys_start_as_queries=True)
