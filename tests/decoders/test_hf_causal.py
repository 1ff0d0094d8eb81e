"""A Hugging Face language model as the decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


def test_something_to_build_from_is_needed() -> None:
    with pytest.raises(ValueError, match="either `pretrained`"):
        HFCausalLM()
