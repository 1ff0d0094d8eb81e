"""LoRA on named projections: names of the plain model beside those of the updates, and a plain model after merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.lora import LoRACausalLM
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.freezing import FreezePlan
from lightning_internvl.middleware.perceive_sampler import PerceiveSampler
from lightning_internvl.model import VLM

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip


def drawn(**settings: object) -> LoRACausalLM:
    torch.manual_seed(0)
    model = LoRACausalLM(config=CONFIG, rank=4, **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def test_it_takes_over_the_state_of_a_plain_model_and_starts_as_that() -> None:
    plain, model = HFCausalLM(config=CONFIG).eval(), LoRACausalLM(config=CONFIG, rank=4).eval()
    state = plain.state_dict()
    assert {n for n in model.state_dict() if "lora_" not in n} == set(state)
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert len(found.missing_keys) == 2 * 5 * 2
    assert all("lora_" in name for name in found.missing_keys)
    embeds, mask = torch.randn(2, 5, 32), torch.ones(2, 5)
    assert model.hidden(embeds, mask).equal(plain.hidden(embeds, mask))
    again = LoRACausalLM(config=CONFIG, rank=4).eval()
    trained = drawn()
    again.load_state_dict(trained.state_dict())
    assert again.hidden(embeds, mask).equal(trained.hidden(embeds, mask))


def test_the_updates_alone_train() -> None:
    model = VLM(torch.nn.Identity(), None, drawn())
    plan = FreezePlan(["decoder.*.lora_*"])
    plan.check(model)
    plan.apply(model, 0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 5 * 2
    assert all("lora_" in name for name in trained)


def test_merged_updates_leave_a_plain_model_with_the_same_answers(tmp_path: Path) -> None:
    model, (embeds, mask) = drawn(), (torch.randn(2, 5, 32), torch.ones(2, 5))
    before = model.hidden(embeds, mask)
    encoder = EvaViT(image_size=8, patch_size=4, dim=16, depth=1, heads=2, mlp_dim=16)
    sampler = PerceiveSampler(encoder_dim=16, decoder_dim=32, num_queries=2, dim=16, depth=1, heads=2, mlp_dim=16)
    vlm = VLM(encoder, sampler, model)
    with pytest.raises(ValueError, match=r"no layout of a folder is known for a model of .*decoder LoRACausalLM"):
        vlm.save_pretrained(tmp_path / "early")
    model.merge()
    torch.testing.assert_close(model.hidden(embeds, mask), before, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == HFCausalLM(config=CONFIG).state_dict().keys()
    vlm.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"LoRA targets \['wqkv'\] are no layers of the decoder; valid choices: .*q_proj"):
        LoRACausalLM(config=CONFIG, targets=["wqkv"])
