"""Frozen weights in 4, 8 and 16 bits: their size, what they stand for, and that files never hold them."""

from __future__ import annotations

import sys

import bitsandbytes as bnb
import pytest
import torch
from test_peft import LORA, adapted_model, disturb, outputs

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.export.plain import make_plain
from lightning_internvl.layers import peft
from lightning_internvl.layers.quantization import quantize, quantized_bytes, quantized_layers, true_numel
from lightning_internvl.layers.quantized_layers import Bf16Linear, Bf16Table, Int8Head, Int8Table, Nf4Linear
from lightning_internvl.layers.state_dict import own_tensors

METHODS = ("nf4", "int8", "bf16")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])
SHAPE_OF_SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
SMALL_LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 2,
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


@pytest.mark.parametrize("method", METHODS)
def test_a_step_and_an_answer_through_quantised_weights(method: str) -> None:
    model, batch = adapted_model("llava_toy", {"decoder": LORA})
    before = {name: parameter.numel() for name, parameter in own_tensors(model).items()}
    plain = outputs(model, batch)
    quantize(model, {"decoder": method})
    found = outputs(model, batch)
    assert torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.97
    kinds = {type(layer).__name__ for layer in quantized_layers(model).values()}
    assert kinds >= {"Bf16Table" if method == "bf16" else "Int8Table"}
    assert {name: tensor.numel() for name, tensor in own_tensors(model).items()} == before
    model.train()
    hidden, labels = model.hidden_states(**batch)
    model.objectives["next_token"](hidden, labels, model.decoder.head).backward()
    updates = [p for n, p in model.named_parameters() if ".lora_B." in n]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in updates)
    assert any(p.grad.abs().sum() > 0 for p in updates)
    weights = own_tensors(model)
    model.eval()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[0] == 2
    assert all(weights[name].equal(tensor) for name, tensor in own_tensors(model).items()), "an evaluation changed the weights"


@pytest.mark.parametrize("method", METHODS)
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
    # int8 and bf16 layers round what they read too, which merged ones do not.
    limit = 1e-4 if method == "nf4" else 5e-2
    torch.testing.assert_close(outputs(model, batch), found, rtol=0, atol=limit * float(found.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [None, "model.embed_tokens.weight", "lm_head.weight"])
def test_plain_again(method: str, tied: bool, kept: str | None) -> None:
    """Every tensor is what the quantised one stood for, embeddings and output layer share one if they did, and nothing of what
    trained is lost."""
    model = Holder(HFCausalLM(config=SMALL_LLAMA | {"tie_word_embeddings": tied}))
    quantize(model, {"decoder": method}, keep=[f"decoder.lm.{kept}"])
    before = own_tensors(model)
    make_plain(model)
    after = own_tensors(model)
    assert not quantized_layers(model)
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in after)
    words, head = model.decoder.lm.get_input_embeddings(), model.decoder.lm.get_output_embeddings()
    assert [type(words), type(head)] == [torch.nn.Embedding, torch.nn.Linear]
    assert (words.weight is head.weight) is tied


def test_bfloat16_is_half_the_size_and_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import would raise
    model = Holder(HFCausalLM(config=SMALL_LLAMA | {"hidden_size": 48, "tie_word_embeddings": False}))  # no whole blocks
    whole = own_tensors(model)
    matrices = {name for name, tensor in whole.items() if tensor.ndim == 2}
    foretold = sum(quantized_bytes(model, {"decoder": "bf16"}).values())
    report = quantize(model, {"decoder": "bf16"})["decoder"]
    assert (report.changed, report.left) == (len(matrices), 0)
    assert report.before - report.after == foretold == 2 * sum(whole[name].numel() for name in matrices)
    found = own_tensors(model)
    assert found.keys() == whole.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(whole[name].bfloat16().float() if name in matrices else whole[name])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_layers_in_bfloat16_answer_in_the_type_of_the_question(device: str) -> None:
    layer = torch.nn.Linear(8, 6, device=device)
    model = Holder(torch.nn.Sequential(layer))
    weight, bias = layer.weight.detach().clone(), layer.bias
    quantize(model, {"decoder": "bf16"})
    (made,) = model.decoder
    assert type(made) is Bf16Linear
    assert made.bias is bias
    states = torch.randn(2, 3, 8, device=device, requires_grad=True)
    found = made(states)
    expected = torch.nn.functional.linear(states.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert found.dtype == torch.float32
    assert found.equal(expected.float())
    found.sum().backward()
    assert states.grad.dtype == torch.float32
    torch.testing.assert_close(states.grad[0, 0], weight.bfloat16().float().sum(dim=0), rtol=0.02, atol=0.02)
    assert (made.weight.grad, bias.grad is None) == (None, False)
    assert made(states.bfloat16()).dtype == torch.bfloat16
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=kind):
            assert (made(states).dtype, layer(states).dtype) == (kind, kind)


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_in_bfloat16_keeps_its_adapter(tied: bool) -> None:
    model = Holder(HFCausalLM(config=SMALL_LLAMA | {"tie_word_embeddings": tied}))
    peft.add_adapters(model, {"decoder": LORA | {"targets": ["lm.lm_head"]}})
    disturb(model)
    states = torch.randn(2, 3, 64)
    before = model.decoder.head(states).detach()
    quantize(model, {"decoder": "bf16"})
    head = model.decoder.lm.get_output_embeddings()
    assert isinstance(head.get_base_layer(), Bf16Linear)
    torch.testing.assert_close(model.decoder.head(states), before, rtol=0, atol=0.02 * float(before.abs().max()))
    make_plain(model)
    assert type(model.decoder.lm.get_output_embeddings()) is torch.nn.Linear
    torch.testing.assert_close(model.decoder.head(states), before, rtol=0, atol=0.02 * float(before.abs().max()))


def test_what_is_in_16_bits_already_stays() -> None:
    model = Holder(HFCausalLM(config=SMALL_LLAMA).to(torch.bfloat16))
    report = quantize(model, {"decoder": "bf16"})["decoder"]
    assert (report.changed, report.left, report.before) == (0, 0, report.after)
    assert own_tensors(model)["decoder.lm.lm_head.weight"].dtype == torch.bfloat16


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
    packed = model.decoder[0].packed
    assert (packed.numel(), true_numel("0.packed", packed)) == (128 * 64 // 2 + 4 * 128, 128 * 64)


def test_four_bits_are_those_of_bitsandbytes_and_held_as_any_type() -> None:
    """Bytes that pass for bfloat16 are gathered by FSDP2 as they are."""
    layer, states = torch.nn.Linear(128, 6), torch.randn(2, 3, 128, requires_grad=True)
    theirs = bnb.nn.Linear4bit(128, 6, quant_type="nf4", compress_statistics=False)
    theirs.load_state_dict(layer.state_dict())
    theirs.to("cpu")
    ours = Nf4Linear(layer)
    for dtype in (torch.uint8, torch.bfloat16):
        ours.hold_as(dtype)
        found, expected = (made(states) for made in (ours, theirs))
        assert found.equal(expected)
        assert torch.autograd.grad(found.sum(), states)[0].equal(torch.autograd.grad(expected.sum(), states)[0])
        assert ours.weight.equal(bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(states).dtype == torch.bfloat16
        torch.testing.assert_close(ours(states).float(), found, rtol=0.02, atol=0.05)


def test_layers_whose_rows_are_no_whole_blocks_stay() -> None:
    model = Holder(torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 8)))
    report = quantize(model, {"decoder": "nf4"})["decoder"]
    assert (report.changed, report.left) == (1, 1)
    assert type(model.decoder[0]) is torch.nn.Linear


@pytest.mark.parametrize("tied", [True, False])
def test_token_embeddings_in_8_bits(tied: bool) -> None:
    decoder = HFCausalLM(config=SMALL_LLAMA | {"hidden_size": 16, "tie_word_embeddings": tied}).eval()
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


@pytest.mark.parametrize("tied", [True, False])
def test_token_embeddings_in_bfloat16(tied: bool) -> None:
    decoder = HFCausalLM(config=SMALL_LLAMA | {"tie_word_embeddings": tied}).eval()
    words, head = (own.weight.detach().clone() for own in (decoder.lm.get_input_embeddings(), decoder.lm.get_output_embeddings()))
    quantize(Holder(decoder), {"decoder": "bf16"})
    table, output = decoder.lm.get_input_embeddings(), decoder.lm.get_output_embeddings()
    assert [type(table), type(output)] == [Bf16Table, Bf16Linear]
    assert (table.weight is output.weight) is tied
    assert table.weight.dtype == torch.bfloat16
    ids, states = torch.randint(50, (2, 3)), torch.randn(2, 3, 64)
    assert decoder.embed(ids).equal(words.bfloat16().float()[ids])
    expected = states @ head.T
    torch.testing.assert_close(decoder.head(states), expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    assert ("decoder.lm.lm_head.weight" in own_tensors(Holder(decoder))) is not tied


def test_what_trains_is_not_quantised() -> None:
    model, _ = adapted_model("llava_toy", {})
    trained = {"middleware.mlp1.0.weight", "decoder.lm.model.embed_tokens.weight"}
    quantize(model, {"decoder": "nf4", "middleware": "nf4"}, keep=trained)
    kinds = {name: type(layer).__name__ for name, layer in model.named_modules()}
    assert kinds["decoder.lm.model.embed_tokens"] == "Embedding"
    assert kinds["decoder.lm.model.layers.0.mlp.up_proj"] == "Nf4Linear"
    assert "Nf4Linear" not in {kind for name, kind in kinds.items() if name.startswith("encoder.")}
    assert kinds["middleware.mlp1.0"] == "Linear"
    assert kinds["middleware.mlp1.2"] == "Nf4Linear"
