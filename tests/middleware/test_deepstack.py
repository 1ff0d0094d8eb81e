"""DeepStack: features of several encoder layers behind blocks of any decoder, whatever runs the blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.hf_seq2seq import HFSeq2SeqLM
from lightning_internvl.decoders.mrope import MRopeCausalLM
from lightning_internvl.decoders.qwen import Qwen
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.deepstack import DeepStackMerger, DeepStackMLP
from lightning_internvl.model.vlm import VLM
from lightning_internvl.training.activation_checkpointing import recompute_blocks
from lightning_internvl.training.compile import compile_blocks

IMAGE, TOKENS = 22, 16
SIZES = {
    "hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 23,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
DECODERS = {
    "llama": lambda: HFCausalLM(config={"model_type": "llama", **SIZES}),
    "qwen": lambda: Qwen(config={"model_type": "qwen2", **SIZES}),
    "gpt2": lambda: HFCausalLM(config={"model_type": "gpt2", "n_embd": 12, "n_layer": 3, "n_head": 2, "vocab_size": 23}),
    "mrope": lambda: MRopeCausalLM(
        config={"model_type": "qwen3_vl_text", **SIZES, "head_dim": 6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 1]}}
    ),
}  # fmt: skip


def model_of(encoder: InternViT, decoder: str = "llama", **options: Any) -> VLM:
    torch.manual_seed(0)
    language = DECODERS[decoder]()
    middleware = DeepStackMLP(encoder_dim=24, decoder_dim=12, **{"deep_layers": [1, 2], "patch_layer": -1, **options})
    return VLM(encoder, middleware, language, image_token_id=IMAGE).eval()


def batch(*rows: int) -> dict[str, Tensor]:
    """Rows with so many pictures after two words, padded on the right."""
    ids = [[5, 6, *[IMAGE] * (TOKENS * count), 7, 8, 9 + count] for count in rows]
    longest, lengths = max(map(len, ids)), torch.tensor(list(map(len, ids)))
    ids_BL = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    pixels = torch.randn(sum(rows), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = ids_BL.masked_fill((mask == 0) | (ids_BL == IMAGE), -100)
    return {"input_ids": ids_BL, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


def by_hand(model: VLM, inputs: dict[str, Tensor], into: dict[int, int]) -> Tensor:
    """States of a LLaMA whose block `into[k]` gets what the k-th connector makes of its layer, one block after the other."""
    found = model.middleware(model.encoder(inputs["pixel_values"], layers=model.middleware.layers))
    places, llama = inputs["input_ids"] == IMAGE, model.decoder.lm.model
    x = model.decoder.embed(inputs["input_ids"])
    x[places] = found.tokens.flatten(0, 1)
    angles = llama.rotary_emb(x, torch.arange(x.shape[1])[None])
    for number, block in enumerate(llama.layers):
        x = block(x, position_embeddings=angles)
        for connector, place in into.items():
            if place == number:
                x[places] += found.deep[connector].flatten(0, 1)
    return llama.norm(x)


@pytest.mark.parametrize("into", [None, [2, 0]])
@torch.no_grad()
def test_features_are_added_behind_the_blocks_that_are_named(encoder: InternViT, into: list[int] | None) -> None:
    model, inputs = model_of(encoder, into=into), batch(2, 0, 1)
    hidden = model.hidden_states(**inputs).hidden
    expected, seen = by_hand(model, inputs, dict(enumerate(into or [0, 1]))), inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[seen], expected[seen])
    assert model.visual_tokens(inputs["pixel_values"]).shape == (3, TOKENS, 12)


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_every_decoder_of_blocks_is_fed_in_answers_too(encoder: InternViT, decoder: str) -> None:
    model, inputs = model_of(encoder, decoder), batch(2)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    for beams in (1, 2):
        options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
        found = model.generate(**prompt, **options, use_cache=True)
        if beams == 1:  # the same by whole rows, one word after the other
            for length in range(5):
                row = torch.cat([prompt["input_ids"], found[:, :length]], dim=1)
                logits = model(row, torch.ones_like(row), prompt["pixel_values"]).logits
                assert int(logits[0, -1].argmax()) == int(found[0, length])
    assert all(hook.features is None for hook in model.deep_features.hooks)
    for mlp in model.middleware.deep:
        for parameter in mlp.parameters():
            parameter.zero_()
    silent = model.hidden_states(**inputs).hidden
    model.middleware.into = ()
    same = VLM(model.encoder, model.middleware, DECODERS[decoder](), image_token_id=IMAGE).eval()
    same.decoder.load_state_dict(model.decoder.state_dict())
    torch.testing.assert_close(same.hidden_states(**inputs).hidden, silent)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_blocks_that_are_computed_again_give_the_same_gradients(encoder: InternViT, kind: str) -> None:
    plain, inputs = model_of(encoder).train(), batch(1, 2)
    again = copy.deepcopy(plain)
    recompute_blocks(again, {"decoder": kind, "encoder": kind})
    for model in (plain, again):
        model(**inputs).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or p.grad.equal(q.grad), name
    assert all(p.grad is not None and bool(p.grad.any()) for p in plain.middleware.parameters())


@pytest.mark.parametrize("decoder", ["llama", "qwen", "mrope"])
def test_packed_rows_are_fed_as_rows_of_their_own(encoder: InternViT, decoder: str) -> None:
    model, inputs = model_of(encoder, decoder), batch(2, 0, 1)
    seen = inputs["attention_mask"].bool()
    row = {name: inputs[name][seen][None] for name in ("input_ids", "attention_mask")}
    packed = model.hidden_states(**row, pixel_values=inputs["pixel_values"], segments=[seen.sum(dim=1).tolist()]).hidden
    torch.testing.assert_close(packed[0], model.hidden_states(**inputs).hidden[seen], rtol=1e-4, atol=1e-5)


def test_a_batch_of_text_keeps_all_connectors_in_the_graph(encoder: InternViT) -> None:
    model = model_of(encoder)
    model(**batch(0)).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.middleware.parameters())


def test_copies_have_hooks_of_their_own(encoder: InternViT) -> None:
    model, inputs = model_of(encoder), batch(1)
    twin = copy.deepcopy(model)
    assert twin.hidden_states(**inputs).hidden.equal(model.hidden_states(**inputs).hidden)
    with torch.no_grad():
        twin.middleware.deep[0][0].weight.add_(1.0)
    assert not torch.allclose(twin.hidden_states(**inputs).hidden, model.hidden_states(**inputs).hidden)


T5 = {"model_type": "t5", "d_model": 12, "d_ff": 12, "num_layers": 3, "num_heads": 2, "d_kv": 6, "vocab_size": 23}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"into": [0]}, r"middleware\.into=\[0\] must name one block .* are \[1, 2\]"),
        ({"into": [1, 1]}, r"middleware\.into=\[1, 1\] must name one block"),
        ({"into": [-1, 0]}, r"middleware\.into=\[-1, 0\] must name one block"),
        ({"into": [0, 3]}, r"DeepStackMLP feeds blocks \[3\] of a decoder that has 0 to 2; change middleware\.into"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_blocks_that_do_not_exist(encoder: InternViT, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model_of(encoder, **options)


def test_decoders_that_cannot_be_fed(encoder: InternViT) -> None:
    middleware = DeepStackMLP(encoder_dim=24, decoder_dim=12, deep_layers=[1])
    with pytest.raises(ValueError, match="HFSeq2SeqLM does not take visual tokens into its blocks; choose another decoder"):
        VLM(encoder, middleware, HFSeq2SeqLM(config=T5))
    with pytest.raises(ValueError, match="6 patches do not divide into blocks of 2 x 2"):
        DeepStackMerger(encoder_dim=24, decoder_dim=12, deep_layers=[1])([torch.zeros(6, 24)] * 2)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler, which looks at all inputs
def test_compiled_blocks_are_fed_in_each_batch_anew(encoder: InternViT) -> None:
    plain = model_of(encoder)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, {"decoder": "eager"})
    for counts in ((0,), (1, 2), (0,), (2, 0)):  # a first batch without pictures is compiled without features
        inputs = batch(*counts)
        torch.testing.assert_close(compiled.hidden_states(**inputs).hidden, plain.hidden_states(**inputs).hidden)
