"""Vision towers of transformers as the encoder: the same numbers, whatever the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
)  # fmt: skip

from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.processors.basic import to_pixels
from lightning_internvl.encoders.hf_naflex import HFNaFlex
from lightning_internvl.encoders.hf_vision import HFVision, flat_inputs
from lightning_internvl.encoders.qwen2_vit import patch_places
from lightning_internvl.layers import hf_attention
from lightning_internvl.layers.attention import attend, choose_backend, keep_backend
from lightning_internvl.layers.peft import add_adapters
from lightning_internvl.model.compose import trusted_build
from lightning_internvl.protocols import Encoder
from lightning_internvl.training.activation_checkpointing import recompute_blocks

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
WIDE = {**SIZES, "intermediate_size": 32}
FAMILIES: dict[str, tuple[dict[str, Any], int, int]] = {  # sizes, special tokens, those of its own
    "clip_vision_model": ({**WIDE, "image_size": 30}, 1, 1),
    "siglip_vision_model": ({**WIDE, "image_size": 30}, 1, 0),  # 30 is no multiple of 14
    "siglip2_vision_model": ({**WIDE, "num_patches": 4}, 1, 0),
    "dinov2": ({**SIZES, "image_size": 28}, 1, 1),
    "dinov2_with_registers": ({**SIZES, "image_size": 28}, 5, 5),
    "dinov3_vit": ({**WIDE, "image_size": 28, "num_register_tokens": 2}, 3, 3),
    "ijepa": ({**WIDE, "image_size": 28}, 0, 0),
    "vit": ({**WIDE, "image_size": 28}, 1, 1),
}


def tower(kind: str, **settings: Any) -> HFVision:
    torch.manual_seed(0)
    return HFVision(config={"model_type": kind, **FAMILIES[kind][0]}, **settings).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_states_are_those_of_transformers(kind: str) -> None:
    encoder, (_, special, own) = tower(kind), FAMILIES[kind]
    assert isinstance(encoder, Encoder)
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    states = encoder(pixels, layers=(0, 2, -1))
    expected = encoder.tower(**encoder._inputs(pixels), output_hidden_states=True)
    assert encoder.special_tokens == special
    assert [state.shape for state in states] == [(2, encoder.num_tokens(), encoder.dim)] * 3
    assert states[0][:, special:].equal(expected.hidden_states[0][:, own:])
    assert states[1][:, special:].equal(expected.hidden_states[2][:, own:])
    assert states[2][:, special:].equal(expected.last_hidden_state[:, own:])
    if encoder.pools:
        assert states[2][:, 0].equal(expected.pooler_output)
    assert len(encoder.sharding_units()) == encoder.depth == 3


@pytest.mark.parametrize("kind", FAMILIES)
def test_pictures_of_other_sizes_and_the_meta_device(kind: str) -> None:
    encoder = tower(kind, image_size=56)
    assert encoder.num_tokens() == 16 + encoder.special_tokens
    assert encoder(torch.randn(1, 3, 56, 42))[0].shape == (1, 12 + encoder.special_tokens, 16)
    with torch.device("meta"):
        shapes = tower(kind)
        assert shapes(torch.empty(2, 3, 28, 28))[0].shape == (2, 4 + shapes.special_tokens, 16)


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_built_again_from_what_a_hand_off_says(kind: str) -> None:
    encoder = tower(kind)
    again = trusted_build(encoder.config).eval()
    again.load_state_dict(encoder.state_dict())
    pixels = torch.randn(1, 3, 28, 28)
    assert again(pixels)[0].equal(encoder(pixels)[0])


@pytest.mark.parametrize(
    ("model", "config", "kind"),
    [
        (CLIPModel, CLIPConfig, "clip_vision_model"),
        (SiglipModel, SiglipConfig, "siglip_vision_model"),
        (Siglip2Model, Siglip2Config, "siglip2_vision_model"),
    ],
)
def test_the_tower_of_a_model_with_text(model: Any, config: Any, kind: str, tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    whole = model(config(vision_config=FAMILIES[kind][0], text_config=text)).eval()
    whole.save_pretrained(tmp_path)
    encoder = HFVision(pretrained=str(tmp_path)).eval()
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    expected = whole.vision_model(**encoder._inputs(pixels)).last_hidden_state
    assert encoder(pixels)[0][:, encoder.special_tokens :].equal(expected[:, encoder.own_tokens :])
    assert encoder.config["pretrained"] is None
    with torch.device("meta"):
        assert HFVision(pretrained=str(tmp_path)).num_tokens() == encoder.num_tokens()


def test_without_a_pooling_head_patches_stand_alone() -> None:
    pooled, plain = tower("siglip_vision_model"), tower("siglip_vision_model", pool=False)
    assert (plain.special_tokens, plain.tower.head) == (0, None)
    plain.load_state_dict({n: t for n, t in pooled.state_dict().items() if ".head." not in n})
    pixels = torch.randn(1, 3, 30, 30)
    assert plain(pixels)[0].equal(pooled(pixels)[0][:, 1:])


def test_patches_are_cut_as_the_processor_of_siglip_2_cuts_them() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 28, 42)
    flat = flat_inputs(pixels, 14)
    reshaped = pixels[0].reshape(3, 2, 14, 3, 14).permute(1, 3, 2, 4, 0).reshape(6, -1)
    assert flat["pixel_values"][0].equal(reshaped)
    assert flat["spatial_shapes"].tolist() == [[2, 3]]
    assert isinstance(tower("siglip2_vision_model").tower, Siglip2VisionModel)


@pytest.mark.parametrize("kind", FAMILIES)
def test_blocks_train_with_adapters_and_are_computed_again(kind: str) -> None:
    encoder, pixels = tower(kind), torch.randn(2, 3, 28, 28)
    model = torch.nn.Module()
    model.encoder = encoder.requires_grad_(False)
    settings = {"method": "lora", "rank": 2, "alpha": 2, "dropout": 0.0, "targets": "blocks"}
    add_adapters(model, {"encoder": settings})  # type: ignore[arg-type]
    gradients = []
    for again in (None, "full"):
        recompute_blocks(model, {"encoder": again})
        encoder(pixels)[0].square().mean().backward()
        trained = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        gradients.append(torch.cat([g.flatten() for g in trained.values() if g is not None]))
        encoder.zero_grad()
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "encoder.pretrained=FOLDER_OR_ID is needed, or null and an encoder.config"),
        ({"config": {"model_type": "llama"}}, "a llama has no square patches; choose a tower"),
        ({"config": {"model_type": "timm_wrapper"}}, "a timm_wrapper is built by timm; choose"),
        ({"pretrained": "/nowhere/at/all"}, "there is no such folder"),
    ],
)
def test_what_is_no_tower(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HFVision(**settings)


def test_masking_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep_tokens=0\.5: a tower of transformers sees all"):
        tower("dinov2")(torch.randn(1, 3, 28, 28), keep=0.5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_chosen_attention_is_that_of_the_tower(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(hf_attention, "attend", lambda *tensors, **options: calls.append(options) or attend(*tensors, **options))
    encoder = tower(kind)
    pixels = torch.randn(1, 3, encoder.image_size, encoder.image_size)
    (before,) = encoder(pixels)
    with keep_backend():
        choose_backend("math")
        (found,) = tower(kind)(pixels)
    assert len(calls) == encoder.depth
    assert not any(options["causal"] or options["mask"] is not None for options in calls)
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-6)


def test_pictures_of_several_sizes_in_a_batch_are_as_each_alone() -> None:
    config = {"model_type": "siglip2_vision_model", **WIDE, "num_patches": 16}
    encoder = HFNaFlex(config=config).eval()
    alone = HFVision(config=config, pool=False).eval()
    alone.load_state_dict(encoder.state_dict())
    processor = AnyResolution(56, patch_size=14, frames=1, min_pixels=784, mean=[0.5] * 3, std=[0.5] * 3)
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)
    pictures = [processor(noise[:, :30]), processor(noise[:56, :56])]
    inputs = processor.inputs(pictures)
    found = encoder(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"], layers=(0, -1))
    assert [state.shape for state in found] == [(12 + 16, 16)] * 2
    for picture, states in zip(pictures, zip(*(state.split([12, 16]) for state in found), strict=True), strict=True):
        _, rows, columns = processor.grid(picture)
        places = patch_places((1, rows, columns), 2) @ torch.tensor([columns, 1])
        expected = alone(to_pixels(picture, [0.5] * 3, [0.5] * 3), layers=(0, -1))
        for state, whole in zip(states, expected, strict=True):
            torch.testing.assert_close(state, whole[0, places], rtol=1e-5, atol=1e-5)
    with torch.device("meta"):  # as a plan runs it
        planned = HFNaFlex(config=config)(torch.zeros(12 + 16, 588), image_grid_thw=[(1, 6, 2), (1, 4, 4)])
        assert planned[0].shape == (12 + 16, 16)
    with pytest.raises(ValueError, match="patches have 48 values, those of 14 px have 588; give processor=naflex"):
        encoder(torch.zeros(4, 48), image_grid_thw=[(1, 2, 2)])
    with pytest.raises(ValueError, match="a clip_vision_model reads squares; choose encoder=hf"):
        HFNaFlex(config={"model_type": "clip_vision_model", **FAMILIES["clip_vision_model"][0]})
