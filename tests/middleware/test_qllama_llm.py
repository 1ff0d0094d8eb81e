"""A QLLaMA grown from a LLaMA reads text as that LLaMA does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lightning_internvl.middleware.qllama import QLLaMA

SIZES = {
    "vocab_size": 29, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN = {"encoder_dim": 12, "num_queries": 4, "embed_dim": 8, "pool_heads": 2}


def llama(folder: Path, **change: Any) -> LlamaForCausalLM:
    """A small LLaMA with random weights and norms, also saved."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "rms_norm_eps": 1e-3, "rope_parameters": rope, **change})).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def grown(folder: Path, **change: Any) -> QLLaMA:
    return QLLaMA(**{**OWN, "vocab_size": 29, "init_from_llm": str(folder), **change}).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [6, 2, 1])
def test_text_states_are_those_of_the_llama(groups: int, tied: bool, tmp_path: Path) -> None:
    model, ids = llama(tmp_path, num_key_value_heads=groups, tie_word_embeddings=tied), torch.randint(3, 29, (2, 17))
    middleware = grown(tmp_path)
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        embeds = middleware.qllama.model.embed_tokens(ids)
        states, _ = middleware.qllama(embeds, middleware._rotary(0, 17, ids.device))
        assert (states - expected).abs().max() <= 1e-5 * expected.abs().max()
        torch.testing.assert_close(middleware.head(states), model(ids).logits, atol=1e-4, rtol=1e-5)
        text = middleware.embed_text(ids, torch.ones_like(ids))
        torch.testing.assert_close(text, expected[:, -1] @ middleware.text_projection, atol=1e-4, rtol=1e-5)


def test_a_text_encoder_without_queries_takes_no_language_head(tmp_path: Path) -> None:
    model, ids = llama(tmp_path, num_key_value_heads=3), torch.randint(3, 29, (1, 9))
    middleware = grown(tmp_path, num_queries=0)
    states, _ = middleware.qllama(middleware.qllama.model.embed_tokens(ids), middleware._rotary(0, 9, ids.device))
    torch.testing.assert_close(states, model.model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_a_mistral_is_a_llama(tmp_path: Path) -> None:
    model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=3, head_dim=4)).eval()
    model.save_pretrained(tmp_path)
    middleware, ids = grown(tmp_path), torch.randint(3, 29, (2, 9))
    states, _ = middleware.qllama(middleware.qllama.model.embed_tokens(ids), middleware._rotary(0, 9, ids.device))
    torch.testing.assert_close(states, model.model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_queries_and_cross_attention_are_fresh_and_words_are_added(tmp_path: Path) -> None:
    model = llama(tmp_path, tie_word_embeddings=True)
    middleware = grown(tmp_path, vocab_size=33)
    cross = middleware.qllama.model.layers[0].cross_attn
    assert 0.01 < cross.q_proj.weight.std() < 0.03
    assert torch.pdist(middleware.query_tokens[0]).min() > 0
    table, words = middleware.qllama.model.embed_tokens.weight, model.model.embed_tokens.weight
    for rows in (table, middleware.qllama.lm_head.weight):
        assert rows[:29].equal(words)
        assert rows[29:].equal(words.mean(dim=0).expand(4, -1))
    assert grown(tmp_path, vocab_size=20).qllama.model.embed_tokens.weight.equal(words[:20])


def test_sizes_come_from_the_llama_and_are_enough_without_it(tmp_path: Path) -> None:
    llama(tmp_path, num_key_value_heads=2)
    middleware = grown(tmp_path)
    assert middleware.sizes == (24, 3, 6, 40, 500.0, 1e-3)
    settings = {**OWN, "init_from_llm": str(tmp_path), **middleware.without_source}
    again = QLLaMA(**settings)
    assert settings["init_from_llm"] is None
    again.load_state_dict(middleware.state_dict())
    ids = torch.randint(3, 29, (2, 5))
    torch.testing.assert_close(again.embed_text(ids, torch.ones_like(ids)), middleware.embed_text(ids, torch.ones_like(ids)))


def test_on_the_meta_device_nothing_is_loaded(tmp_path: Path) -> None:
    llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        middleware = grown(tmp_path)
        assert middleware.sizes.dim == 24
        assert all(p.is_meta for p in middleware.parameters())
        (tmp_path / "config.json").unlink()
        assert grown(tmp_path, **middleware.sizes._asdict()).sizes == middleware.sizes


@pytest.mark.parametrize(
    "size", [{"dim": 48}, {"depth": 2}, {"heads": 3}, {"mlp_dim": 41}, {"rope_theta": 1e4}, {"norm_eps": 1e-6}]
)
def test_a_size_that_is_not_the_llamas_is_refused(size: dict[str, Any], tmp_path: Path) -> None:
    llama(tmp_path)
    (name, value), *_ = size.items()
    with pytest.raises(ValueError, match=rf"middleware\.{name}={value}, but middleware\.init_from_llm=.* has {name}="):
        grown(tmp_path, **size)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        ({"attention_bias": True}, r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_a_llama_that_qllama_would_compute_otherwise_is_refused(change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    llama(tmp_path, **change)
    with pytest.raises(ValueError, match=fault):
        grown(tmp_path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type='qwen2' \(it reads llama, mistral\)"):
        grown(tmp_path)


def test_a_checkpoint_that_is_not_there_or_lacks_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        grown(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"init_from_llm=.* cannot be read: Unrecognized model"):
        grown(tmp_path)
    model = llama(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks tensors of a LlamaForCausalLM: model\.layers\.1\.mlp\.down_proj\.weight"):
        grown(tmp_path)


def test_without_a_llama_sizes_are_needed() -> None:
    with pytest.raises(
        ValueError, match=r"needs dim, depth, heads, mlp_dim, or a LLaMA to take them from \(middleware\.init_from_"
    ):
        QLLaMA(**OWN, vocab_size=29)
