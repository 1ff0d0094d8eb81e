"""Next-token prediction in chunks equals that over all tokens at once, and never holds all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers.peft import add_adapters
from lightning_internvl.layers.quantization import quantize
from lightning_internvl.objectives import NextToken
from lightning_internvl.objectives.linear_cross_entropy import plain_layer

VOCAB, WIDTH = 70, 64
Head = Callable[[Tensor], Tensor]


class Largest(TorchDispatchMode):
    """Remembers the most rows of logits that any operation gave; the weight's transpose looks alike."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[-1] == VOCAB and len(tensor) != WIDTH:
                self.most = max(self.most, len(tensor))
        return result


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, VOCAB, (4, 17))
    labels[torch.rand(4, 17) < 0.4] = -100
    return torch.randn(4, 17, WIDTH).to(dtype).requires_grad_(), labels


def whole_and_chunked(head: Head, parameters: list[Tensor], **options: Any) -> list[list[Tensor]]:
    """Loss and gradients of both, with an upstream gradient that is not 1."""
    hidden, labels = example()
    found = []
    for chunk in (None, 7):
        loss = NextToken(chunk=chunk, **options)(hidden, labels, head) * 3
        found.append([loss.detach(), *torch.autograd.grad(loss, [hidden, *parameters], allow_unused=True)])
    return found


@pytest.mark.parametrize("average", ["token", "square_root"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_chunks_change_nothing(average: str, smoothing: float, bias: bool, plain: bool) -> None:
    layer = nn.Linear(WIDTH, VOCAB, bias=bias)
    head = layer if plain else lambda states: layer(states)
    assert (plain_layer(head) is layer) == plain
    whole, chunked = whole_and_chunked(head, list(layer.parameters()), label_smoothing=smoothing, average=average)
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(other, one)


def test_only_one_chunk_of_logits_is_held() -> None:
    layer, (hidden, labels) = nn.Linear(WIDTH, VOCAB), example()
    for head in (layer, lambda states: layer(states)):
        with Largest() as seen:
            NextToken(chunk=7)(hidden, labels, head).backward()
        assert 0 < seen.most <= 7


def test_a_frozen_head_has_no_gradient_and_the_states_have_theirs() -> None:
    layer = nn.Linear(WIDTH, VOCAB).requires_grad_(False)
    whole, chunked = whole_and_chunked(layer, [])
    torch.testing.assert_close(chunked[1], whole[1])
    hidden, labels = example()
    NextToken(chunk=7)(hidden, labels, layer).backward()
    assert layer.weight.grad is None


def test_nothing_is_differentiated_where_nobody_asks() -> None:
    layer, (hidden, labels) = nn.Linear(WIDTH, VOCAB), example()
    with torch.no_grad():
        torch.testing.assert_close(NextToken(chunk=7)(hidden, labels, layer), NextToken(chunk=None)(hidden, labels, layer))


def test_tied_embeddings_get_both_gradients() -> None:
    table, labels = nn.Embedding(VOCAB, WIDTH), torch.randint(0, VOCAB, (4, 17))
    layer = nn.Linear(WIDTH, VOCAB, bias=False)
    layer.weight = table.weight
    grads = [torch.autograd.grad(NextToken(chunk=chunk)(table(labels), labels, layer), layer.weight)[0] for chunk in (None, 7)]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("mixed", [True, False])
def test_half_precision_is_judged_in_float32_and_as_close_as_without_chunks(mixed: bool) -> None:
    layer = nn.Linear(WIDTH, VOCAB)
    hidden, labels = example()
    exact = torch.autograd.grad(NextToken(chunk=None)(hidden, labels, layer), [hidden, layer.weight])
    layer = layer if mixed else layer.bfloat16()
    states, errors = hidden.detach().bfloat16().requires_grad_(), []
    for chunk in (None, 7):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = NextToken(chunk=chunk)(states, labels, layer)
        grads = torch.autograd.grad(loss, [states, layer.weight])
        assert loss.dtype == torch.float32
        assert [g.dtype for g in grads] == [states.dtype, layer.weight.dtype]
        errors.append([((g.float() - e).norm() / e.norm()).item() for g, e in zip(grads, exact, strict=True)])
    assert all(other < 1.2 * one < 0.05 for one, other in zip(*errors, strict=True))


@pytest.mark.parametrize("kind", ["lora", "nf4", "int8", "plain"])
def test_heads_that_are_more_than_a_layer_are_called(kind: str) -> None:
    config = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB}  # fmt: skip
    model = nn.Module()
    model.decoder = HFCausalLM(config=config)
    if kind == "lora":
        settings = {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["lm.lm_head"]}
        add_adapters(model, {"decoder": settings})
        nn.init.normal_(model.decoder.lm.lm_head.lora_B["default"].weight)
    elif kind != "plain":
        quantize(model, {"decoder": kind})
    assert (plain_layer(model.decoder.head) is not None) == (kind == "plain")
    trained = [p for n, p in model.decoder.lm.lm_head.named_parameters() if "lora" in n]
    whole, chunked = whole_and_chunked(model.decoder.head, trained)
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(other, one)


def test_hooks_of_a_layer_are_obeyed() -> None:
    layer = nn.Linear(WIDTH, VOCAB)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert plain_layer(layer) is None
    whole, chunked = whole_and_chunked(layer, [layer.weight])
    torch.testing.assert_close(chunked, whole)


def test_the_gradient_is_not_taken_twice_silently() -> None:
    layer, (hidden, labels) = nn.Linear(WIDTH, VOCAB), example()
    loss = NextToken(chunk=7)(hidden, labels, layer)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_batch_without_labels_gives_zero_and_a_zero_gradient() -> None:
    layer, (hidden, labels) = nn.Linear(WIDTH, VOCAB), example()
    loss = NextToken(chunk=1)(hidden, torch.full_like(labels, -100), layer)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, layer.weight)[0].eq(0).all()


def test_on_the_meta_device_shapes_are_enough() -> None:
    hidden, labels = (x.to("meta") for x in example())
    assert NextToken(chunk=7)(hidden, labels, nn.Linear(WIDTH, VOCAB, device="meta")).is_meta


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True])
def test_a_chunk_of_no_tokens_is_refused(chunk: float) -> None:
    with pytest.raises(ValueError, match=f"chunk={chunk!r} must be a whole number above 0"):
        NextToken(chunk=chunk)


def test_the_definition() -> None:
    """Against the plain formula in float64."""
    layer, (hidden, labels) = nn.Linear(WIDTH, VOCAB), example()
    loss = NextToken(chunk=5)(hidden, labels, layer)
    full = F.cross_entropy(layer.double()(hidden.double())[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, full.float())
