"""Beam search: the result of transformers, of brute force, and of a model without a cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_internvl.middleware.beam_search import write
from lightning_internvl.middleware.qllama import QLLaMA

VOCABULARY, EOS, PAD = 11, 2, 1  # transformers fills with the end token where padding is 0


def twins(seed: int) -> tuple[QLLaMA, LlamaForCausalLM]:
    """A QLLaMA whose query reads nothing, and a LLaMA of its weights: a single query sees itself alone, as causality has it."""
    torch.manual_seed(seed)
    qllama = QLLaMA(
        encoder_dim=8, vocab_size=VOCABULARY, dim=16, depth=3, heads=2, mlp_dim=24, num_queries=1, embed_dim=8, pool_heads=2,
        init_std=0.4,
    ).eval()  # fmt: skip
    for layer in qllama.qllama.model.layers:
        if layer.cross_attn is not None:
            torch.nn.init.zeros_(layer.cross_attn.o_proj.weight)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict({name: t for name, t in qllama.qllama.state_dict().items() if "cross_attn" not in name})
    return qllama, llama


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("shortest", [0, 4])
def test_beam_search_is_that_of_transformers(beams: int, length_penalty: float, shortest: int) -> None:
    lengths = set()
    for seed in range(4):
        qllama, llama = twins(seed)
        prompt = torch.randint(3, VOCABULARY, (4, 3))
        settings = {"max_new_tokens": 10, "min_new_tokens": shortest, "num_beams": beams, "length_penalty": length_penalty}
        ours = qllama.generate(torch.randn(4, 5, 8), prompt, eos_id=EOS, pad_id=PAD, **settings)
        embeds = torch.cat([qllama.query_tokens.expand(4, -1, -1), qllama.qllama.model.embed_tokens(prompt)], dim=1)
        if beams == 1:
            del settings["length_penalty"]
        theirs = llama.generate(
            inputs_embeds=embeds.detach(), attention_mask=torch.ones(embeds.shape[:2]), do_sample=False, eos_token_id=EOS,
            pad_token_id=PAD, **settings,
        )  # fmt: skip
        assert ours.tolist() == theirs.tolist()
        lengths |= {[*row, EOS].index(EOS) for row in ours.tolist()}
    assert len(lengths) > 1 or length_penalty > 1, "no caption ended early"


@pytest.mark.parametrize("beams", [1, 3])
def test_without_a_cache_captions_are_the_same(qllama: QLLaMA, beams: int) -> None:
    visual, prompt = torch.randn(3, 17, 24), torch.randint(3, 31, (3, 4))
    settings = {"max_new_tokens": 12, "eos_id": EOS, "pad_id": PAD, "num_beams": beams}
    captions = qllama.generate(visual, prompt, **settings)
    assert captions.equal(qllama.generate(visual, prompt, use_cache=False, **settings))
    assert len({tuple(row) for row in captions.tolist()}) == 3
    alone = [qllama.generate(visual[i : i + 1], prompt[i : i + 1], **settings)[0].tolist() for i in range(3)]
    padded = [row + [PAD] * (captions.shape[1] - len(row)) for row in alone]
    assert captions.tolist() == padded


class Table:
    """A model of which the next token depends on the last one alone."""

    def __init__(self, logits_VV: Tensor) -> None:
        self.logits = logits_VV

    def __call__(self, ids_RL: Tensor) -> Tensor:
        return self.logits[ids_RL[:, -1]]

    def reorder(self, rows_S: Tensor) -> None:
        """Nothing is kept."""


def best_text(table: Tensor, first: int, longest: int, penalty: float) -> list[int]:
    """The best of all texts, one by one: they end with token 0, or are `longest` tokens long."""
    logs, scores = table.log_softmax(dim=-1), {}
    for length in range(1, longest + 1):
        for text in itertools.product(range(len(table)), repeat=length):
            if 0 in text[:-1] or (text[-1] != 0 and length < longest):
                continue
            total = sum(logs[a, b] for a, b in itertools.pairwise((first, *text)))
            scores[text] = float(total) / length**penalty
    return list(max(scores, key=scores.get))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_enough_beams_the_best_of_all_texts_is_found(penalty: float) -> None:
    for _ in range(10):
        table = torch.randn(4, 4) * 2
        found = write(
            Table(table), torch.tensor([[1]]), max_new_tokens=4, eos_id=0, num_beams=64, length_penalty=penalty, pad_id=9
        )
        assert found[0].tolist() == best_text(table, 1, 4, penalty)


@pytest.mark.parametrize("settings", [{"num_beams": 0}, {"max_new_tokens": 0}, {"min_new_tokens": 9}])
def test_a_search_for_nothing_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="1 or more beams and 0 <= min_new_tokens <= max_new_tokens"):
        write(Table(torch.zeros(3, 3)), torch.ones(1, 1, dtype=torch.long), **{"max_new_tokens": 3, "eos_id": 0} | settings)
