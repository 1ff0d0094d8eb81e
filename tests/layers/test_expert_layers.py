"""Experts as layers: adapters and 4 bits reach them, files do not tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.export.plain import make_plain
from lightning_internvl.layers import peft
from lightning_internvl.layers.expert_layers import ExpertLinear
from lightning_internvl.layers.quantization import quantize, quantized_bytes
from lightning_internvl.layers.quantized_layers import Nf4Weight
from lightning_internvl.layers.state_dict import own_tensors

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 50, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # its weights are turned, and it has biases
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
LORA = {"method": "lora", "rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": peft.BLOCKS}
EXPERTS = LORA | {"targets": ["*.experts.*"]}


def model_of(kind: str, **own: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"decoder": HFCausalLM(config={"model_type": kind, **SIZES, **KINDS[kind], **own})})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model.eval()


def states_of(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return model["decoder"].hidden(torch.randn(2, 9, 64), torch.ones(2, 9, dtype=torch.long))


def widen(model: nn.Module) -> None:
    """Updates as training leaves them."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)


def near(found: Tensor, wanted: Tensor, limit: float = 1e-5) -> bool:
    return float((found - wanted).detach().abs().max()) <= limit * float(wanted.detach().abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_they_are_transformers_experts_and_merged_their_sum(kind: str) -> None:
    model = model_of(kind)
    before, names = states_of(model), own_tensors(model)
    peft.add_adapters(model, {"decoder": LORA})
    layers = [layer for _, layer in peft.adapted_layers(model) if isinstance(layer, ExpertLinear)]
    assert len(layers) == 2 * 2
    assert {name for name in own_tensors(model) if not peft.is_update(name)} == names.keys()
    assert near(states_of(model), before)
    widen(model)
    found, tensors = states_of(model), own_tensors(model)
    assert not near(found, before, 1e-2)
    again = model_of(kind)
    peft.add_adapters(again, {"decoder": LORA})
    again.load_state_dict(model.state_dict())
    assert states_of(again).equal(found)
    with peft.without_adapters(model):
        assert near(states_of(model), before)
    merged = peft.merged_tensors(tensors, {"decoder": LORA})
    plain = copy.deepcopy(model)
    peft.merge(plain)
    assert not any(isinstance(module, ExpertLinear) for module in plain.modules())
    assert near(states_of(plain), found)
    assert own_tensors(plain).keys() == names.keys() == merged.keys()
    assert all(tensor.equal(merged[name]) for name, tensor in own_tensors(plain).items())
    fresh = model_of(kind)
    fresh.load_state_dict(merged)  # by transformers' own experts
    assert near(states_of(fresh), found)


def test_updates_are_those_of_peft() -> None:
    """Sizes and product of PEFT 0.21.2's layer over a parameter, whose halves hold the experts flat."""
    from peft import LoraConfig, inject_adapter_in_model

    for kind in ("qwen3_moe", "gpt_oss"):
        model = model_of(kind)
        peft.add_adapters(model, {"decoder": EXPERTS})
        widen(model)
        theirs = model_of(kind)["decoder"].lm
        config = LoraConfig(r=3, lora_alpha=6.0, target_modules=[], target_parameters=["mlp.experts.down_proj"])
        inject_adapter_in_model(config, theirs)
        ours = model["decoder"].lm.model.layers[1].mlp.experts.down_proj
        layer = theirs.model.layers[1].mlp.experts
        from lightning_internvl.layers.expert_layers import for_peft

        a, b = for_peft(ours.lora_A["default"].weight, ours.lora_B["default"].weight)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
        merged = peft.merged_weight(ours.weight, peft._updates(ours), 2.0)
        assert near(ours.weight + layer.get_delta_weight("default"), merged)


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_compute_what_they_stand_for(kind: str) -> None:
    model = model_of(kind)
    peft.add_adapters(model, {"decoder": EXPERTS})
    widen(model)
    foretold = sum(quantized_bytes(model, {"decoder": "nf4"}).values())
    done = quantize(model, {"decoder": "nf4"})["decoder"]
    held = [m for m in model.modules() if isinstance(m, Nf4Weight)]
    assert sum(type(m) is Nf4Weight for m in held) == 2 * 2
    assert done.left == 0
    packed = sum(m.packed.nbytes for m in held if type(m) is Nf4Weight)
    assert packed == sum(m.shape.numel() for m in held if type(m) is Nf4Weight) * 9 // 16
    assert foretold < done.before / 2
    found, tensors = states_of(model), own_tensors(model)
    assert {name for name in tensors if not peft.is_update(name)} == own_tensors(model_of(kind)).keys()
    updates = [parameter for name, parameter in model.named_parameters() if peft.is_update(name)]
    grads = torch.autograd.grad(states_of(model).square().sum(), updates)
    reference = model_of(kind)
    peft.add_adapters(reference, {"decoder": EXPERTS})
    reference.load_state_dict(tensors, strict=False)  # what they stand for
    assert near(found, states_of(reference))
    own = [parameter for name, parameter in reference.named_parameters() if peft.is_update(name)]
    for one, two in zip(grads, torch.autograd.grad(states_of(reference).square().sum(), own), strict=True):
        assert near(one, two, 1e-4)
    make_plain(model)
    assert near(states_of(model), found)
    assert type(model["decoder"].lm.model.layers[0].mlp.experts.down_proj) is nn.Parameter


def test_what_four_bits_keep_for_backward_is_no_matrix() -> None:
    model = model_of("qwen3_moe")
    peft.add_adapters(model, {"decoder": EXPERTS})
    quantize(model, {"decoder": "nf4"})
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        states_of(model)
    assert max(kept) == 4 * 128 * 64 * 9 // 16  # codes and scales of gates and ups


def test_bf16_and_8_bits() -> None:
    model = model_of("qwen3_moe")
    before = states_of(model)
    quantize(model, {"decoder": "bf16"})
    experts = model["decoder"].lm.model.layers[0].mlp.experts
    assert experts.gate_up_proj.weight.dtype == torch.bfloat16
    assert near(states_of(model), before, 0.05)
    assert own_tensors(model)["decoder.lm.model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.float32
    make_plain(model)
    assert experts.gate_up_proj.dtype == torch.float32
    other = model_of("qwen3_moe")
    quantize(other, {"decoder": "int8"})
    assert other["decoder"].lm.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32


@pytest.mark.parametrize(("change", "fault"), [
    ({"method": "dora", "targets": ["*.experts.*"]}, r"method=dora: lm\.model\.layers\.\*\.mlp\.experts\.down_proj are experts"),
    ({"rank": 64}, r"peft\.decoder: rank=64 is no low rank for experts that read 64 numbers"),
    ({"targets": ["*.expert.*"]}, r"'\*\.expert\.\*' matches no linear layer; valid choices: .*experts\.gate_up_proj"),
])  # fmt: skip
def test_what_cannot_work_is_named(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        peft.add_adapters(model_of("qwen3_moe"), {"decoder": LORA | change})


def test_what_trains_or_does_not_fit_is_left() -> None:
    model = model_of("qwen3_moe", moe_intermediate_size=48)
    trained = "decoder.lm.model.layers.0.mlp.experts.gate_up_proj"
    done = quantize(model, {"decoder": "nf4"}, keep=[trained])["decoder"]
    blocks = model["decoder"].lm.model.layers
    assert done.left == 2  # down, which reads 48
    assert type(blocks[0].mlp.experts.gate_up_proj) is nn.Parameter
    assert isinstance(blocks[1].mlp.experts.gate_up_proj.held, Nf4Weight)
    assert blocks[1].mlp.experts.down_proj.weight.dtype == torch.float32
    assert states_of(model).isfinite().all()
