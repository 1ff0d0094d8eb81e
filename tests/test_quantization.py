"""Frozen weights in 4 and 8 bits: their size, what they stand for, and that files never hold them."""

from __future__ import annotations

import pytest
import torch
from test_peft import LORA, adapted_model, disturb, outputs

from lightning_internvl import peft
from lightning_internvl.checkpoints.files import own_tensors
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.quantization import Int8Head, Int8Table, quantize, quantized_bytes, quantized_layers, true_numel

SHAPE_OF_SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


class Holder(torch.nn.Module):
    """A model of a decoder alone."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder


def test_a_base_in_4_bits_takes_a_third_of_its_size_in_bf16() -> None:
    with torch.device("meta"):
        whole = sum(p.numel() for p in HFCausalLM(config=SHAPE_OF_SMOLLM2).parameters())
    decoder = HFCausalLM(config=SHAPE_OF_SMOLLM2 | {"num_hidden_layers": 3}).to(torch.bfloat16)
    table = decoder.lm.get_input_embeddings().weight.numel()
    blocks = sum(p.numel() for p in decoder.parameters()) - table
    foretold = sum(quantized_bytes(Holder(decoder), {"decoder": "nf4"}).values())
    report = quantize(Holder(decoder), {"decoder": "nf4"})["decoder"]
    assert foretold == pytest.approx(report.after, rel=1e-3)
    assert report[:2] == (3 * 7 + 1, 0)
    assert report.before == pytest.approx(2 * (blocks + table), rel=1e-4)  # and a few rotary frequencies
    small = sum(buffer.nbytes for buffer in decoder.lm.get_input_embeddings().buffers())
    per_weight = (report.after - small) / blocks
    assert whole == pytest.approx(134_515_008, rel=1e-3)
    assert small + per_weight * (whole - table) <= 0.35 * 2 * whole


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_step_and_an_answer_through_quantised_weights(method: str) -> None:
    model, batch = adapted_model("llava_toy", {"decoder": LORA})
    before = {name: parameter.numel() for name, parameter in own_tensors(model).items()}
    plain = outputs(model, batch)
    quantize(model, {"decoder": method})
    found = outputs(model, batch)
    assert torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.97
    assert {type(layer).__name__ for layer in quantized_layers(model).values()} >= {"Int8Table"}
    assert {name: tensor.numel() for name, tensor in own_tensors(model).items()} == before
    model.train()
    hidden, labels = model.read(**batch)
    model.objectives["next_token"](hidden, labels, model.decoder.head).backward()
    updates = [p for n, p in model.named_parameters() if ".lora_B." in n]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in updates)
    assert any(p.grad.abs().sum() > 0 for p in updates)
    weights = own_tensors(model)
    model.eval()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[0] == 2
    assert all(weights[name].equal(tensor) for name, tensor in own_tensors(model).items()), "an evaluation changed the weights"


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_merging_goes_into_what_the_quantised_weights_stand_for(method: str) -> None:
    model, batch = adapted_model("llava_toy", {"decoder": LORA})
    disturb(model)
    quantize(model, {"decoder": method})
    stands_for = own_tensors(model)
    found = outputs(model, batch)
    peft.merge(model)
    merged = own_tensors(model)
    name = "decoder.lm.model.layers.1.mlp.up_proj"
    delta = 5 / 3 * stands_for[f"{name}.lora_B.default.weight"] @ stands_for[f"{name}.lora_A.default.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], stands_for[f"{name}.weight"] + delta, rtol=1e-5, atol=1e-6)
    # int8 layers round what they read too, which merged ones do not.
    limit = 1e-4 if method == "nf4" else 5e-2
    torch.testing.assert_close(outputs(model, batch), found, rtol=0, atol=limit * float(found.abs().max()))


def test_quantised_twice_is_quantised_once() -> None:
    """A hand-off holds what quantised weights stand for; quantised again, nothing is lost."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64)
    model = Holder(torch.nn.Sequential(layer))
    quantize(model, {"decoder": "nf4"})
    once = own_tensors(model)["decoder.0.weight"]
    again = Holder(torch.nn.Sequential(torch.nn.Linear(128, 64)))
    again.decoder[0].weight.data = once.clone()
    quantize(again, {"decoder": "nf4"})
    assert own_tensors(again)["decoder.0.weight"].equal(once)
    packed = model.decoder[0].weight
    assert (packed.numel(), true_numel(packed)) == (128 * 64 // 2, 128 * 64)


def test_layers_whose_rows_are_no_whole_blocks_stay() -> None:
    model = Holder(torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 8)))
    report = quantize(model, {"decoder": "nf4"})["decoder"]
    assert (report.changed, report.left) == (1, 1)
    assert type(model.decoder[0]) is torch.nn.Linear


@pytest.mark.parametrize("tied", [True, False])
def test_token_embeddings_in_8_bits(tied: bool) -> None:
    config = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    decoder = HFCausalLM(config=config).eval()
    words, head = decoder.lm.get_input_embeddings().weight.clone(), decoder.lm.get_output_embeddings().weight.clone()
    quantize(Holder(decoder), {"decoder": "nf4"})
    table, output = decoder.lm.get_input_embeddings(), decoder.lm.get_output_embeddings()
    assert isinstance(table, Int8Table)
    assert isinstance(output, Int8Head)
    ids, states = torch.randint(50, (2, 3)), torch.randn(2, 3, 16)
    error = words.abs().amax(dim=1).max() / 127
    assert (decoder.embed(ids) - words[ids]).abs().max() <= error
    torch.testing.assert_close(decoder.head(states), states @ output.weight.T, rtol=1e-5, atol=1e-6)
    assert (output.weight - head).abs().max() <= head.abs().amax(dim=1).max() / 127
    assert ("decoder.lm.lm_head.weight" in own_tensors(Holder(decoder))) is not tied


def test_what_trains_is_not_quantised() -> None:
    model, _ = adapted_model("llava_toy", {})
    trained = {"middleware.mlp1.0.weight", "decoder.lm.model.embed_tokens.weight"}
    quantize(model, {"decoder": "nf4", "middleware": "nf4"}, keep=trained)
    kinds = {name: type(layer).__name__ for name, layer in model.named_modules()}
    assert kinds["decoder.lm.model.embed_tokens"] == "Embedding"
    assert kinds["decoder.lm.model.layers.0.mlp.up_proj"] == "Linear4bit"
    assert "Linear4bit" not in {kind for name, kind in kinds.items() if name.startswith("encoder.")}
    assert kinds["middleware.mlp1.0"] == "Linear"
    assert kinds["middleware.mlp1.2"] == "Linear4bit"
