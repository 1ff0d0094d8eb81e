"""Qwen's decoder: Qwen2 within its trained length, two rules beyond it, in evaluation only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.qwen import Qwen

CONFIG = {
    "model_type": "qwen2", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def qwen(**change: object) -> Qwen:
    torch.manual_seed(0)
    decoder = Qwen(config=CONFIG, **{"seq_length": 8} | change)
    for layer in decoder.lm.model.layers:  # so that attention has something to decide
        torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=0.7)
        torch.nn.init.normal_(layer.self_attn.k_proj.weight, std=0.7)
    return decoder.eval()


def plain(decoder: Qwen) -> HFCausalLM:
    other = HFCausalLM(config=CONFIG).eval()
    other.lm.load_state_dict(decoder.lm.state_dict())
    return other


def hidden(decoder: HFCausalLM, length: int) -> Tensor:
    ids = torch.arange(length)[None] % 37 + 3
    return decoder.hidden(decoder.embed(ids), torch.ones_like(ids)).detach()


def test_within_the_trained_length_it_is_qwen2() -> None:
    decoder = qwen()
    torch.testing.assert_close(hidden(decoder, 8), hidden(plain(decoder), 8))


def test_rules_act_beyond_it_and_in_evaluation_only() -> None:
    decoder = qwen()
    expected = hidden(plain(decoder), 12)
    assert not torch.allclose(hidden(decoder, 12), expected, atol=1e-3)
    torch.testing.assert_close(hidden(decoder.train(), 12), expected)
    torch.testing.assert_close(hidden(qwen(dynamic_ntk=False, log_n=False), 12), expected)


def test_log_n_leaves_earlier_places_alone() -> None:
    decoder = qwen(dynamic_ntk=False)
    found, expected = hidden(decoder, 12), hidden(plain(decoder), 12)
    torch.testing.assert_close(found[:, :8], expected[:, :8])
    assert not torch.allclose(found[:, 8:], expected[:, 8:], atol=1e-4)


@pytest.mark.parametrize(("length", "alpha"), [(7, 1), (8, 1), (9, 3), (16, 3), (17, 7), (32, 7), (33, 15)])
def test_the_base_grows_with_the_length(length: int, alpha: int) -> None:
    rotary = qwen().rotary
    rotary.length = length
    assert rotary.alpha == alpha == max(2 ** math.ceil(math.log2(length / 8) + 1) - 1, 1)


def test_writing_equals_reading_at_one_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of the prompt stays while the answer grows beyond the next doubling; log-n counts kept tokens too."""
    decoder = qwen()
    prompt = torch.arange(15)[None] % 37 + 3
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    new = decoder.generate(decoder.embed(prompt), torch.ones_like(prompt), **options)
    monkeypatch.setattr(type(decoder.rotary), "alpha", 3)
    ids = prompt
    for _ in range(6):
        state = decoder.hidden(decoder.embed(ids), torch.ones_like(ids))[:, -1]
        logits = decoder.head(state)
        logits[:, 2] = -math.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert new.equal(ids[:, 15:])


def test_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        decoder = Qwen(config=CONFIG, seq_length=8).eval()
        assert decoder.hidden(torch.zeros(1, 12, 32), torch.ones(1, 12)).shape == (1, 12, 32)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type='llama' is not supported by Qwen"):
        Qwen(config=CONFIG | {"model_type": "llama"})
    with pytest.raises(ValueError, match="seq_length=1 must be 2 or more"):
        Qwen(config=CONFIG, seq_length=1)
