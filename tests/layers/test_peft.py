"""Adapters on every part of every recipe: they start as nothing, train alone, and merge into what they did."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_internvl.checkpoints.weight_source import SourceWeights
from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import StageSettings, stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.inference.collators import make_view
from lightning_internvl.layers import peft
from lightning_internvl.layers.quantization import plain_name
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.compose import compose_model
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.freezing import FreezePlan

TOYS = (
    "blip2_toy",
    "clip_toy",
    "internvl_1_5_toy",
    "internvl_3_5_toy",
    "llava_toy",
    "llava_onevision_toy",
    "qwen2_vl_toy",
    "qwen2_5_vl_toy",
    "qwen3_vl_toy",
    "xcomposer2_toy",
)
LORA = {"method": "lora", "rank": 3, "alpha": 5, "dropout": 0.0, "targets": peft.BLOCKS}
DORA = LORA | {"method": "dora"}


@functools.cache
def last_stage(recipe: str) -> StageSettings:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=[f"experiment={recipe}", "paths.run=unused"])
    plain = OmegaConf.to_container(composed, resolve=True)
    return stage_settings(plain, plain["pipeline"][-1])


def adapted_model(recipe: str, settings: dict[str, Any]) -> tuple[VLM, Any]:
    """The last stage of a recipe with adapters, and two of its samples as a batch."""
    torch.manual_seed(0)
    stage = last_stage(recipe)
    model, tokenizers = compose_model(stage.parts.config | {"peft": settings}, build)
    data = build(stage.data.dataset(stage.reads))
    return model.eval(), make_view(stage, model, tokenizers, build).training([data[0], data[1]])


def outputs(model: VLM, batch: dict[str, Any]) -> Tensor:
    """Logits of a model with a decoder, else embeddings or scores."""
    with torch.no_grad():
        if model.decoder is not None:
            return model.decoder.head(model.hidden_states(**batch).hidden)
        if "labels" in batch:
            return model.visual_tokens(batch["pixel_values"])
        text = model.encode_text(batch["itc_ids"], batch["itc_mask"])
        return torch.cat([model.encode_image(batch["pixel_values"]).flatten(0, -2), text])


def disturb(model: nn.Module) -> None:
    """Adapters as training leaves them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if peft.is_update(name):
                parameter.add_(torch.randn_like(parameter) * 0.2 * parameter.abs().mean().clamp(min=0.2))


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("recipe", TOYS)  # tests/export/test_plain.py has all of them
def test_merged_equals_adapter(recipe: str, settings: dict[str, Any]) -> None:
    parts = last_stage(recipe).parts.config
    if recipe == "xcomposer2_toy" and settings is DORA:
        with pytest.raises(ValueError, match="dora cannot be combined with Partial LoRA"):
            adapted_model(recipe, {"decoder": settings})
        parts = parts | {"decoder": None}
    able = {part: settings for part in ("encoder", "decoder") if parts.get(part)}
    plain, batch = adapted_model(recipe, {})
    model, _ = adapted_model(recipe, able)
    model.load_state_dict(plain.state_dict(), strict=False)
    peft.start_magnitudes(model, own_tensors(model))
    before = outputs(plain, batch)
    torch.testing.assert_close(outputs(model, batch), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    disturb(model)
    with_adapters = outputs(model, batch)
    assert (with_adapters - before).abs().max() > 1e-3 * before.abs().max()
    tensors = peft.merged_tensors(own_tensors(model), able)
    peft.merge(model)
    assert not peft.adapted_layers(model)
    torch.testing.assert_close(outputs(model, batch), with_adapters, rtol=0, atol=1e-4 * float(with_adapters.abs().max()))
    merged = own_tensors(model)
    assert merged.keys() == tensors.keys() == own_tensors(plain).keys()
    assert all(torch.allclose(merged[name], tensors[name], atol=1e-6) for name in merged)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_is_what_the_library_does(method: str) -> None:
    model, _ = adapted_model("llava_toy", {"decoder": LORA | {"method": method}})
    disturb(model)
    layers = [layer for _, layer in peft.adapted_layers(model)]
    assert len(layers) == 3 * 7
    before = own_tensors(model)
    ours = peft.merged_tensors(before, {"decoder": LORA | {"method": method}})
    for name, layer in peft.adapted_layers(model):
        layer.merge(safe_merge=True)
        torch.testing.assert_close(ours[f"{name}.weight"], layer.get_base_layer().weight, rtol=1e-5, atol=1e-6)


def test_what_trains_under_adapters() -> None:
    model, _ = adapted_model("llava_toy", {"decoder": LORA})
    plan = FreezePlan(["middleware", "decoder", "decoder.lm.model.norm"], {"decoder": LORA})
    plan.check(model)
    plan.apply(model, 0)
    trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {name for name in trained if name.startswith("decoder.") and not peft.is_update(name)}
    assert whole == {"decoder.lm.model.norm.weight"}
    assert sum(peft.is_update(name) for name in trained) == 2 * 3 * 7
    assert any(name.startswith("middleware.") for name in trained)
    assert not any(name.startswith("encoder.") for name in trained)
    row = next(row for row in plan.table(model, 0) if row["group"] == "decoder.lm")
    assert "lora of rank 3" in row["why"]
    assert "held by decoder's adapters" in row["why"]
    late = FreezePlan([{"name": "decoder", "from_step": 5}], {"decoder": LORA})
    update = next(name for name, _ in model.named_parameters() if peft.is_update(name))
    assert [late.trains(update, step) for step in (4, 5)] == [False, True]


def test_adapters_reach_the_named_layers_of_their_part_alone() -> None:
    model, _ = adapted_model("llava_toy", {"decoder": LORA | {"targets": ["*.layers.0.*.q_proj", "*.v_proj"]}})
    names = sorted(name for name, _ in peft.adapted_layers(model))
    assert names == sorted(
        ["decoder.lm.model.layers.0.self_attn.q_proj", *(f"decoder.lm.model.layers.{i}.self_attn.v_proj" for i in range(3))]
    )
    with pytest.raises(ValueError, match=r"peft\.decoder\.targets: 'wqkv' matches no linear layer; valid choices: blocks, "):
        adapted_model("llava_toy", {"decoder": LORA | {"targets": ["*.q_proj", "wqkv"]}})


def test_a_model_with_adapters_is_no_official_checkpoint(tmp_path: Any) -> None:
    model, _ = adapted_model("llava_toy", {"decoder": LORA})
    with pytest.raises(ValueError, match="carries adapters"):
        model.save_pretrained(tmp_path / "early")
    peft.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_other_adapters_of_a_source_are_merged_and_equal_ones_go_on() -> None:
    model, _ = adapted_model("llava_toy", {"decoder": LORA})
    disturb(model)
    origin = SourceWeights(own_tensors(model), {"decoder": LORA})
    assert origin.for_model({"decoder": LORA | {"dropout": 0.1}}).keys() == own_tensors(model).keys()
    for other in ({}, None, {"decoder": LORA | {"rank": 4}}, {"decoder": LORA | {"alpha": 6}}, {"encoder": LORA}):
        found = origin.for_model(other)
        assert not any(peft.is_update(name) for name in found)
    name = "decoder.lm.model.layers.0.mlp.up_proj.weight"
    assert not found[name].equal(origin.tensors[name])
    assert found["decoder.lm.model.norm.weight"].equal(origin.tensors["decoder.lm.model.norm.weight"])


def test_adapters_of_short_weights_are_long() -> None:
    """A step of a hundredth of a per cent must not be lost."""
    decoder = HFCausalLM(
        config=last_stage("llava_toy").parts.config["decoder"]["config"] | {"dtype": "bfloat16", "vocab_size": 50}
    )
    model = nn.Module()
    model.decoder = decoder.to(torch.bfloat16)
    peft.add_adapters(model, {"decoder": LORA})
    kinds = {peft.is_update(name): parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    states = decoder.hidden(torch.randn(1, 3, 128, dtype=torch.bfloat16), torch.ones(1, 3))
    assert states.dtype == torch.bfloat16


def test_a_frozen_tower_saves_no_activations() -> None:
    """The alignment stage of LLaVA: what backward keeps belongs to the connector and to what follows it."""
    model, batch = adapted_model("llava_toy", {"decoder": LORA})
    FreezePlan(["middleware"], {}).apply(model, 0)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.encoder(batch["pixel_values"], layers=model.middleware.layers)
        assert not kept
        model.hidden_states(**batch)
    assert kept
