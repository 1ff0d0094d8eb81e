"""Blocks that compute their forward pass again: the same numbers and names, less memory, and only where a backward pass comes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peaks import Alive
from lightning_internvl.choices import block_faults, block_settings, by_part
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.layers.peft import add_adapters
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken
from lightning_internvl.training.activation_checkpointing import _registered, kept_operations, recompute_blocks

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attention_dropout": 0.2,
}  # fmt: skip
LORA = {"method": "lora", "rank": 2, "alpha": 4, "dropout": 0.3, "targets": "blocks"}
KINDS = ("full", "selective")


def tiny(kind: str | None = None, *, train: str = "", lora: bool = False) -> VLM:
    """A tower with drop path, a connector, and a decoder with dropout; the same weights each time."""
    torch.manual_seed(0)
    tower = InternViT(image_size=16, patch_size=4, dim=24, depth=3, heads=3, mlp_dim=32, drop_path=0.5, init_std=0.2)
    decoder = HFCausalLM(config=LLAMA, vocab_size=50)
    model = VLM(tower, MLPConnector(encoder_dim=24, decoder_dim=32), decoder, image_token_id=49)
    add_adapters(model, {"decoder": LORA} if lora else {})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(train) or "lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.train()
    recompute_blocks(model, by_part(kind))
    return model


def loss_of(model: VLM) -> Tensor:
    torch.manual_seed(1)
    ids = torch.randint(48, (2, 24))
    ids[:, 2:18] = 49
    hidden, labels = model.hidden_states(ids, torch.ones_like(ids), torch.randn(2, 3, 16, 16), ids.masked_fill(ids == 49, -100))
    return NextToken()(hidden, labels, model.decoder.head)


def kept(model: VLM) -> int:
    with Alive(model) as alive:
        loss = loss_of(model)
    size = alive.bytes
    loss.backward()
    return size


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_draws_and_names_are_the_same_bit_by_bit(kind: str, lora: bool) -> None:
    models = [tiny(one, lora=lora, train="none" if lora else "") for one in (None, kind)]
    losses, draws = [], []
    for model in models:
        losses.append(loss_of(model))
        losses[-1].backward()
        draws.append(torch.rand(3))  # neither pass may leave the random numbers elsewhere
    assert losses[0].equal(losses[1])
    assert draws[0].equal(draws[1])
    plain, again = models
    assert list(plain.state_dict()) == list(again.state_dict())
    grads = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert sum(bool(grad.any()) for grad in grads.values()) > 0.8 * len(grads)  # drop path leaves some branches out
    assert all(again.get_parameter(name).grad.equal(grad) for name, grad in grads.items())


def test_each_kind_keeps_less() -> None:
    plain, selective, full = (kept(tiny(kind)) for kind in (None, "selective", "full"))
    assert full < 0.35 * plain
    assert full < selective < 0.7 * plain


def calls(block: nn.Module, run: Callable[[], Any]) -> int:
    """How often the first layer inside a block runs, forward and again."""
    found: list[int] = []
    first = next(module for module in block.modules() if isinstance(module, nn.Linear))
    handle = first.register_forward_hook(lambda *_: found.append(1))
    run()
    handle.remove()
    return len(found)


def test_only_blocks_that_backward_passes_compute_again() -> None:
    model = tiny("full", train="middleware")

    def step() -> None:
        loss_of(model).backward()

    assert [calls(block, step) for block in model.encoder.sharding_units()] == [1, 1, 1]  # nothing before it trains
    assert [calls(block, step) for block in model.decoder.sharding_units()] == [2, 2, 2]  # frozen, on the way of gradients
    with torch.no_grad():
        assert calls(model.decoder.sharding_units()[0], lambda: loss_of(model)) == 1


def test_a_copy_has_blocks_of_its_own() -> None:
    model = tiny("full", train="decoder")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    loss_of(model).backward()
    assert model.decoder.sharding_units()[0].self_attn.q_proj.weight.grad.any()
    assert all(parameter.grad is None for parameter in other.parameters())


def test_settings_are_words_for_all_parts_or_by_part() -> None:
    common = {"activation_checkpointing": "full", "compile": None}
    assert block_settings(common, {}) == {"activation_checkpointing": by_part("full"), "compile": {}}
    own = block_settings(common, {"activation_checkpointing": {"encoder": None}, "compile": True})
    assert own["activation_checkpointing"] == {"encoder": None, "middleware": "full", "decoder": "full"}
    assert own["compile"] == {"encoder": True, "middleware": True, "decoder": True}
    assert not any(block_settings(common, {"activation_checkpointing": False})["activation_checkpointing"].values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation_checkpointing": "ful"}, "'ful' is not known; valid choices: null, full, selective"),
        ({"activation_checkpointing": {"decodr": "full"}}, "no part 'decodr'; valid choices: encoder"),
        ({"activation_checkpointing": {"decoder": True}}, "activation_checkpointing.decoder=True is not known"),
        ({"compile": "jit"}, "compile='jit' is not known; valid choices: null, true, auto, inductor, aot_eager, eager"),
        ({"compile": 1}, "compile=1 is not known"),
        ({"compile": [True]}, r"compile=[True] is not known"),
    ],
)
def test_wrong_words_are_named(settings: dict[str, Any], said: str) -> None:
    faults = list(block_faults(settings))
    assert faults
    assert all(said in fault for fault in faults)


def test_selective_keeps_attention_of_packages_that_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define("_flash_attn_varlen_forward(Tensor q) -> Tensor")
        library.impl("_flash_attn_varlen_forward", lambda q: calls.append(1) or q.sin(), "CPU")
        kernel = torch.ops.flash_attn._flash_attn_varlen_forward

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor) -> Tensor:
                ctx.save_for_backward(q)
                return kernel(q)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad * ctx.saved_tensors[0].cos()

        class Block(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Attention.apply(x.tanh()).exp()

        assert kernel.default not in kept_operations()
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        assert kernel.default in kept_operations()
        part = nn.Module()
        part.block = Block()
        part.sharding_units = lambda: [part.block]
        x, model = torch.randn(3, requires_grad=True), nn.Module()
        model.decoder = part
        expected = torch.autograd.grad(part.block(x).sum(), x)[0]
        recompute_blocks(model, {"decoder": "selective"})
        calls.clear()
        assert torch.autograd.grad(part.block(x).sum(), x)[0].equal(expected)
        assert len(calls) == 1
    _registered.cache_clear()
