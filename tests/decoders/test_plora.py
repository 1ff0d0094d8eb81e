"""Partial LoRA: on visual tokens only, nothing at the start, and there to stay when PEFT wraps the projections."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.plora import PartialLoRA, PartialLoRACausalLM, mark, rows_of

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip


def decoder(drawn: bool = True, **settings: Any) -> PartialLoRACausalLM:
    """A small one, its B drawn anew so that the updates act."""
    torch.manual_seed(0)
    found = PartialLoRACausalLM(config=CONFIG, **{"rank": 4, "alpha": 6, **settings}).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if drawn and ".plora." in name:
                parameter.normal_(std=0.3)
    return found


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, mask and visual places of three rows: some visual tokens, none, all but one."""
    torch.manual_seed(1)
    places = torch.zeros(3, 7, dtype=torch.bool)
    places[0, 2:5], places[2, 1:] = True, True
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return torch.randn(3, 7, 32), mask, places


def test_a_fresh_update_changes_nothing_and_yet_learns() -> None:
    model, (embeds, mask, places) = decoder(drawn=False), batch()
    plain = HFCausalLM(config=CONFIG).eval()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if ".plora." not in n})
    assert model.hidden(embeds, mask, places).equal(plain.hidden(embeds, mask))
    model.hidden(embeds, mask, places).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if ".plora." in n}
    assert all(float(g.abs().max()) > 0 for n, g in gradients.items() if ".b." in n)
    assert all(float(g.abs().max()) == 0 for n, g in gradients.items() if n.endswith(".a"))


def test_only_visual_tokens_are_changed() -> None:
    model, (embeds, _, places) = decoder(), batch()
    layer = model.lm.model.layers[0]
    for group in (layer.self_attn.plora, layer.mlp.plora):
        for update in group.values():
            for name in update.b:
                linear = getattr(layer.self_attn if name in "q_proj k_proj v_proj o_proj" else layer.mlp, name)
                x = torch.randn(3, 7, linear.in_features)
                mark(layer, rows_of(places))
                found = linear(x)
                plain = F.linear(x, linear.weight)
                assert found[~places].equal(plain[~places])
                expected = plain + x @ update.a.T @ update.b[name].T * 6 / 4
                torch.testing.assert_close(found[places], expected[places])
    text = model.hidden(embeds, torch.ones(3, 7), torch.zeros_like(places))
    assert text.equal(model.hidden(embeds, torch.ones(3, 7)))
    assert not text[0].allclose(model.hidden(embeds, torch.ones(3, 7), places)[0])
    assert text[1].allclose(model.hidden(embeds, torch.ones(3, 7), places)[1], atol=1e-6)


def test_queries_keys_and_values_share_one_a() -> None:
    names = [n for n, _ in decoder().named_parameters() if ".plora." in n and n.endswith(".a")]
    assert len(names) == 2 * 5  # qkv, out, gate, up, down of each layer


def test_a_batch_without_visual_tokens_has_every_update_in_its_graph() -> None:
    model, (embeds, mask, places) = decoder(), batch()
    model.hidden(embeds, mask, torch.zeros_like(places)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters() if ".plora." in n)


def test_dropout_acts_on_what_the_updates_read() -> None:
    model, (embeds, mask, places) = decoder(dropout=0.5), batch()
    model.train()
    first, second = (model.hidden(embeds, mask, places) for _ in range(2))
    assert first[1].allclose(second[1], atol=1e-6)
    assert not first[0].allclose(second[0])


def test_gradient_checkpointing_sees_the_same_places() -> None:
    model, (embeds, mask, places) = decoder(dropout=0.0), batch()
    model.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.lm.activation_checkpointing_enable()
        model.zero_grad()
        model.hidden(embeds, mask, places).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(g.equal(grads[1][n]) for n, g in grads[0].items())


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_goes_on_from_the_updated_prompt(beams: int) -> None:
    model, (embeds, _, places) = decoder(), batch()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    found = model.generate(embeds, torch.ones(3, 7, dtype=torch.long), places, **options)
    if beams == 1:
        row, ids = embeds[:1], []
        for _ in range(5):  # no cache: the whole row anew for every token
            shown = F.pad(places[:1], (0, row.shape[1] - 7))
            ids.append(int(model.head(model.hidden(row, torch.ones(1, row.shape[1]), shown))[0, -1].argmax()))
            row = torch.cat([row, model.embed(torch.tensor([[ids[-1]]]))], dim=1)
        assert found[0].tolist() == ids
    alone = model.generate(embeds[2:], torch.ones(1, 7, dtype=torch.long), places[2:], **options)
    assert found[2:].equal(alone)
    plain = model.generate(embeds, torch.ones(3, 7, dtype=torch.long), **options)
    assert found[1].equal(plain[1])
    assert not found.equal(plain)


@pytest.mark.parametrize("how", ["inject", "wrap", "all-linear"])
def test_peft_keeps_the_updates(how: str) -> None:
    peft = pytest.importorskip("peft")
    model, (embeds, mask, places) = decoder(), batch()
    before = model.hidden(embeds, mask, places)
    targets = "all-linear" if how == "all-linear" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.inject_adapter_in_model(config, model.lm) if how == "inject" else peft.get_peft_model(model.lm, config)
    assert model.hidden(embeds, mask, places).equal(before)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".plora." in n)  # only PEFT's own train
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for u in updates(model) for m in u.modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tuned, text = model.hidden(embeds, mask, places), model.hidden(embeds, mask)
    assert not tuned[0].allclose(before[0])
    assert not tuned[0].allclose(text[0])
    if how != "inject":
        model.lm = wrapped.merge_and_unload()
        torch.testing.assert_close(model.hidden(embeds, mask, places), tuned, atol=2e-5, rtol=1e-4)


def updates(model: PartialLoRACausalLM) -> list[PartialLoRA]:
    return [module for module in model.modules() if isinstance(module, PartialLoRA)]


def test_a_copy_has_updates_of_its_own() -> None:
    model, (embeds, mask, places) = decoder(), batch()
    before = model.hidden(embeds, mask, places)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for update in updates(other):
            update.a.zero_()
    assert other.hidden(embeds, mask, places).equal(model.hidden(embeds, mask))
    assert model.hidden(embeds, mask, places).equal(before)


def test_it_is_built_and_run_without_memory() -> None:
    with torch.device("meta"):
        model = PartialLoRACausalLM(config=CONFIG, rank=4)
        embeds, places = torch.empty(2, 6, 32), torch.empty(2, 6, dtype=torch.bool)
        assert model.hidden(embeds, torch.ones(2, 6), places).shape == (2, 6, 32)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="rank of 1 or more, not 0"):
        PartialLoRACausalLM(config=CONFIG, rank=0)
    opt = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=r"needs the layers of LLaMA; OPTDecoderLayer has no self_attn.o_proj"):
        PartialLoRACausalLM(config=opt | {"vocab_size": 50, "word_embed_proj_dim": 32}, rank=2)
