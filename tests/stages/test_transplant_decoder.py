"""Visual tokens stand among the words of another language model as among those of the old one; tokens are compared by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_transplant import pictures, solve_all, tower
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_internvl.config.trust import named_in_conf
from lightning_internvl.data.tokenizer import shared_words, toy_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.layers.word_space import in_words_of
from lightning_internvl.middleware.connector import LinearConnector, MLPConnector
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages import DecoderTransplantStage
from lightning_internvl.stages.solved_connector import chain_of, through
from lightning_internvl.stages.transplant_decoder import carry_units
from lightning_internvl.training.transplant import DECODER_STAGE

TOY = {"_target_": "lightning_internvl.data.tokenizer.toy_tokenizer"}
MORE = TOY | {"extra_tokens": ["<new>"]}


def sentencepiece(*tokens: str) -> PreTrainedTokenizerFast:
    """Words with the space mark of SentencePiece."""
    found = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(("</s>", *tokens))}, merges=[]))
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>")


def test_tokens_are_compared_by_their_text() -> None:
    toy, other = toy_tokenizer(), sentencepiece("▁cat", "cat", "红", "▁", "▁quark", "<img>")
    numbers = toy.get_vocab()
    red = toy.convert_ids_to_tokens(toy("红")["input_ids"])
    assert len(red) > 1  # bytes, each of which is no text
    assert shared_words(other, toy) == [(1, numbers["Ġcat"]), (2, numbers["cat"]), (4, numbers["Ġ"])]
    assert len(shared_words(toy, toy)) > 300


def test_what_stands_at_a_word_stands_at_this_word_there() -> None:
    own, other = torch.randn(30, 16), torch.randn(30, 24)
    torch.testing.assert_close(in_words_of(own, own, other, 0.01), other, rtol=0, atol=1e-3)
    between = in_words_of(own[:2].mean(dim=0, keepdim=True), own, other, 0.2)[0]
    near = torch.nn.functional.cosine_similarity(between[None] - other.mean(dim=0), other - other.mean(dim=0))
    assert set(near.topk(2).indices.tolist()) == {0, 1}


@pytest.mark.parametrize("width", [16, 20])
def test_units_that_are_carried_do_what_they_did(width: int) -> None:
    old, new = (MLPConnector(encoder_dim=6, decoder_dim=dim, depth=3) for dim in (16, width))
    carry_units(chain_of(old), chain_of(new))
    x = torch.randn(5, 6)
    hidden = [through(chain_of(one)[:4], x)[:, :16] for one in (old, new)]
    torch.testing.assert_close(hidden[1], hidden[0])


def test_of_fewer_units_those_stay_that_matter() -> None:
    old, new = (MLPConnector(encoder_dim=6, decoder_dim=dim) for dim in (16, 4))
    with torch.no_grad():
        old.mlp1[2].weight[:, [1, 3, 8, 9]] += 10
    carry_units(chain_of(old), chain_of(new))
    assert new.mlp1[0].weight.equal(old.mlp1[0].weight[[1, 3, 8, 9]])
    assert new.mlp1[0].bias.equal(old.mlp1[0].bias[[1, 3, 8, 9]])


def language_model(dim: int, rows: int) -> HFCausalLM:
    config = {
        "model_type": "llama", "vocab_size": rows, "hidden_size": dim, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return HFCausalLM(config=config, embed_std=0.5)


@pytest.mark.parametrize("kind", [LinearConnector, MLPConnector])
def test_visual_tokens_stand_at_the_words_that_they_stood_at(kind: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = len(toy_tokenizer())
    encoder, before, after = tower(0, 12), language_model(12, rows), language_model(16, rows + 1)
    old = VLM(encoder, kind(encoder_dim=12, decoder_dim=12), before, image_token_id=5)
    new = VLM(encoder, kind(encoder_dim=12, decoder_dim=16), after, image_token_id=5)
    parts: dict[str, Any] = {part: getattr(old, part).config for part in ("encoder", "middleware", "decoder")}
    parts["decoder"] |= {"tokenizer": TOY}
    found = DecoderTransplantStage(
        new, old=parts, weights_of="NEW", temperature=1.0, name="transplant", run_dir=tmp_path, train=["middleware"],
        parts={"decoder": {"tokenizer": MORE}}, max_steps=10, optimizer=None, scheduler=None,
    )  # fmt: skip
    theirs = {name: x.clone() for name, x in own_tensors(after).items()}
    tensors, elsewhere = found.start_tensors(own_tensors(old), lambda _: {f"decoder.{name}": x for name, x in theirs.items()})
    assert elsewhere == {f"decoder.{name}" for name in theirs}
    with torch.no_grad():
        for name, own in own_tensors(new).items():
            own.copy_(tensors.get(name, own))
    solve_all(found)
    seen = pictures(99)["pixel_values"]
    words = [model.decoder.embed(ids) for model, ids in ((old, found.old_ids), (new, found.new_ids))]
    wanted = in_words_of(old.visual_tokens(seen).flatten(0, -2), *words, found.temperature)
    given = new.visual_tokens(seen).flatten(0, -2)
    explained = float((1 - (given - wanted).square().mean() / wanted.var(dim=0).mean()).detach())
    assert explained == pytest.approx(found.measured["tokens_explained"], abs=0.05)
    assert explained > 0.8


def test_a_run_may_be_resumed_with_the_stage_that_is_filled_in() -> None:
    assert DECODER_STAGE in named_in_conf()
