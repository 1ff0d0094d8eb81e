"""XComposer 1 and 2 and MiniGPT-4 in the names of their own code: there and back, from fixtures and from parts put together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import layout_of_checkpoint
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.plora import PartialLoRACausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.middleware.concat import ConcatConnector
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.perceive_sampler import PerceiveSampler
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.model.vlm import VLM

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official"
FIXTURES = ("xcomposer2_plora", "minigpt4", "minigpt4_llama2", "xcomposer1_sampler")
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 50, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
Q_FORMER = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "num_queries": 3, "vision_norm_eps": 1e-5}


def tower() -> EvaViT:
    return EvaViT(image_size=12, patch_size=3, dim=24, depth=2, heads=2, mlp_dim=40)


def systems() -> dict[str, VLM]:
    """One small model of each layout, as a recipe would put it together, with all parameters drawn."""
    torch.manual_seed(0)
    clip = CLIPViT(image_size=12, patch_size=4, dim=24, depth=2, heads=2, mlp_dim=40, post_norm="unused")
    grouped, biased = LLAMA | {"num_key_value_heads": 2}, LLAMA | {"attention_bias": True}
    dims = {"encoder_dim": 24, "decoder_dim": 32}
    models = {
        "xcomposer2": (clip, MLPConnector(**dims), PartialLoRACausalLM(config=grouped, rank=3, alpha=5)),
        "minigpt4": (tower(), QFormer(**dims, **Q_FORMER, text="none"), HFCausalLM(config=LLAMA)),
        "minigpt4 llama2": (tower(), ConcatConnector(**dims), HFCausalLM(config=LLAMA)),
        "xcomposer1": (tower(), PerceiveSampler(**dims, **Q_FORMER), HFCausalLM(config=biased)),
    }
    found = {name: VLM(*parts, image_token_id=49).eval() for name, parts in models.items()}
    with torch.no_grad():
        for model in found.values():
            for parameter in model.parameters():
                parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return found


def batch(model: VLM) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens = model.middleware.tokens_out(model.encoder.num_tokens())
    ids = torch.randint(3, 40, (2, tokens + 5))
    ids[:, 1 : 1 + tokens] = model.image_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 12, 12), "labels": ids}


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixture_is_saved_as_it_was(tmp_path: Path, name: str) -> None:
    load_pretrained(OFFICIAL / name).save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (OFFICIAL / name, tmp_path / "again"))
    assert after.keys() == {n for n in before if not n.endswith("position_ids")}
    assert all(tensor.equal(before[n]) for n, tensor in after.items())
    configs = [json.loads((f / "config.json").read_text()) for f in (OFFICIAL / name, tmp_path / "again")]
    assert len({layout_of_checkpoint(config, {}) for config in configs}) == 1
    assert load_pretrained(tmp_path / "again").state_dict().keys() == load_pretrained(OFFICIAL / name).state_dict().keys()


@pytest.mark.parametrize("name", ["xcomposer2", "minigpt4", "minigpt4 llama2", "xcomposer1"])
def test_parts_put_together_here_are_saved_and_loaded(tmp_path: Path, name: str) -> None:
    model = systems()[name]
    inputs = batch(model)
    expected = model(**inputs)
    model.save_pretrained(tmp_path / "saved", layout=name.partition(" ")[0])
    again = load_pretrained(tmp_path / "saved")
    ids = torch.where(inputs["input_ids"] == model.image_token_id, again.image_token_id, inputs["input_ids"])
    found = again(**(inputs | {"input_ids": ids, "labels": inputs["labels"]}))
    assert found.logits.equal(expected.logits)
    assert found.loss.equal(expected.loss)
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    prompt = {"pixel_values": inputs["pixel_values"]}
    assert again.generate(input_ids=ids, **prompt, **greedy).equal(
        model.generate(input_ids=inputs["input_ids"], **prompt, **greedy)
    )
    again.save_pretrained(tmp_path / "twice", layout=name.partition(" ")[0])
    once, twice = (load_file(tmp_path / f / "model.safetensors") for f in ("saved", "twice"))
    assert once.keys() == twice.keys()
    assert all(tensor.equal(twice[n]) for n, tensor in once.items())


def test_official_names() -> None:
    """Names of the releases, one of each part."""
    from lightning_internvl.checkpoints.adapters import xcomposer1, xcomposer2

    models = systems()
    second = xcomposer2.LAYOUT.official_tensors(
        xcomposer2.LAYOUT.config_of(models["xcomposer2"]), dict(models["xcomposer2"].named_parameters())
    )
    assert second["model.layers.1.attention.wqkv.Plora_B.weight"].shape == ((4 + 2 * 2) * 8, 3)
    assert {"vit.vision_tower.vision_model.pre_layrnorm.weight", "vision_proj.2.bias", "output.weight"} < second.keys()
    first = xcomposer1.LAYOUT.official_tensors(
        xcomposer1.LAYOUT.config_of(models["xcomposer1"]), dict(models["xcomposer1"].named_parameters())
    )
    assert first["flag_image_start"].shape == (1, 1, 32)
    assert {
        "visual_encoder.patch_embed.proj.weight",
        "visual_encoder.blocks.1.attn.q_bias",
        "internlm_model.model.layers.0.self_attn.o_proj.bias",
        "internlm_proj.weight",
        "Qformer.bert.encoder.layer.1.output_query.dense.weight",
    } < first.keys()


def test_a_model_with_updates_is_not_mistaken_for_one_without(tmp_path: Path) -> None:
    systems()["xcomposer2"].save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "internlmxcomposer2"
    systems()["xcomposer1"].save_pretrained(tmp_path / "first")
    assert json.loads((tmp_path / "first" / "config.json").read_text())["model_type"] == "InternLMXComposer"


def test_merged_updates_of_xcomposer_1_are_read_as_nothing(tmp_path: Path) -> None:
    model = systems()["xcomposer1"]
    model.save_pretrained(tmp_path / "saved", layout="xcomposer1")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["internlm_lora"] = {"lora_r": 4, "lora_alpha": 4, "lora_dropout": 0.05, "learn_param": ["q", "v", "ffn"]}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    for name in [n for n in weights if n.endswith(("q_proj.weight", "v_proj.weight")) or ".mlp." in n]:
        if name.startswith("internlm_model."):
            rows, columns = weights[name].shape
            weights[name.replace(".weight", ".lora_A.weight")] = torch.randn(4, columns)
            weights[name.replace(".weight", ".lora_B.weight")] = torch.zeros(rows, 4)
    save_file(weights, tmp_path / "saved" / "model.safetensors")
    again, inputs = load_pretrained(tmp_path / "saved"), batch(model)
    ids = torch.where(inputs["input_ids"] == 49, again.image_token_id, inputs["input_ids"])
    assert again(**(inputs | {"input_ids": ids})).logits.equal(model(**inputs).logits)
    again.save_pretrained(tmp_path / "plain", layout="xcomposer1")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["internlm_lora"] is None
    assert not any("lora" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))

    weights["internlm_model.model.layers.0.mlp.up_proj.lora_B.weight"] += 1
    save_file(weights, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(ValueError, match="LoRA weights that were not merged"):
        load_pretrained(tmp_path / "saved")


def test_the_released_projection_of_minigpt4(tmp_path: Path) -> None:
    weights = {"llama_proj.weight": torch.randn(32, 16), "llama_proj.bias": torch.randn(32)}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "prerelease.pth")
    model = load_pretrained(tmp_path / "prerelease.pth")
    assert isinstance(model.middleware.proj, nn.Linear)
    assert model.middleware.proj.weight.equal(weights["llama_proj.weight"])
    model.save_pretrained(tmp_path / "again.pth")
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == weights.keys()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("xcomposer2_plora", {"vision_proj": "linear"}, "config.json.vision_proj='linear' is not supported"),
        ("xcomposer2_plora", {"lora_r": 5}, r"of another shape: .*Plora_A.weight is \(6, 64\), the config says \(5, 64\)"),
        ("minigpt4", {"num_query_token": 9}, r"query_tokens is \(1, 8, 48\), the config says \(1, 9, 48\)"),
        ("minigpt4_llama2", {"concat": 2}, r"llama_proj.weight is \(64, 192\), the config says \(64, 96\)"),
        ("xcomposer1_sampler", {"cross_attention_freq": 1}, "missing: Qformer.bert.encoder.layer.1.crossattention"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    shutil.copytree(OFFICIAL / name, tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text()) | change
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "changed")
