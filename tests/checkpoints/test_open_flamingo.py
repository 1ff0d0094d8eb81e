"""Flamingo under OpenFlamingo's names, there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_internvl import load_pretrained
from lightning_internvl.decoders.flamingo import FlamingoCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.perceiver_resampler import PerceiverResampler
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 4, "vocab_size": 60, "max_seq_len": 64}
CASES = {"llama untied": (LLAMA | {"tie_word_embeddings": False}, 1), "llama tied": (LLAMA | {"tie_word_embeddings": True}, 2),
         "mpt": (MPT | {"tie_word_embeddings": True}, 4)}  # fmt: skip


def model(case: str, max_frames: int = 0) -> VLM:
    text, every = CASES[case]
    torch.manual_seed(0)
    encoder = CLIPViT(image_size=12, patch_size=6, dim=64, depth=2, heads=1, mlp_dim=32, post_norm="unused")
    sizes = {"heads": 2, "head_dim": 8, "mlp_ratio": 3}
    resampler = PerceiverResampler(encoder_dim=64, latents=3, depth=2, max_frames=max_frames, special_tokens=1, **sizes)
    decoder = FlamingoCausalLM(encoder_dim=64, config=text, every=every, **sizes)
    vlm = VLM(encoder, resampler, decoder, objectives={"next_token": NextToken()}, image_token_id=50)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return vlm.eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 50, 6, 7, 50, 8], [50, 9, 10, 11, 12, 13]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "pixel_values": torch.randn(3, 3, 12, 12)}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(tmp_path: Path, case: str) -> None:
    ours, inputs = model(case, max_frames=2 if case == "mpt" else 0), batch()
    ours.save_pretrained(tmp_path / "saved")
    back = load_pretrained(tmp_path / "saved")
    assert back(**inputs).logits.equal(ours(**inputs).logits)
    back.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again"))
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == json.loads(
        (tmp_path / "again" / "config.json").read_text()
    )


def test_names_are_those_of_open_flamingo(tmp_path: Path) -> None:
    ours = model("mpt")
    ours.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert {
        "vision_encoder.class_embedding",
        "vision_encoder.conv1.weight",
        "vision_encoder.transformer.resblocks.1.attn.in_proj_weight",
        "perceiver.latents",
        "perceiver.layers.1.0.norm_media.weight",
        "perceiver.layers.1.0.to_kv.weight",
        "perceiver.layers.1.1.0.weight",
        "perceiver.layers.1.1.3.weight",
        "perceiver.norm.bias",
        "lang_encoder.transformer.wte.weight",
        "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.attn.to_out.weight",
        "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.attn_gate",
        "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.ff.1.weight",
        "lang_encoder.transformer.blocks.0.decoder_layer.attn.Wqkv.weight",
        "lang_encoder.transformer.norm_f.weight",
    } <= names
    assert not any("blocks.0.gated" in name for name in names)


def test_tensors_that_stand_twice_are_read_once(tmp_path: Path) -> None:
    ours, inputs = model("llama tied"), batch()
    ours.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lang_encoder.old_decoder_blocks.0.mlp.up_proj.weight"] = torch.zeros(40, 32)
    weights["lang_encoder.gated_cross_attn_layers.1.attn_gate"] = torch.zeros(1)
    weights["vision_encoder.proj"] = torch.zeros(64, 8)
    save_file(weights, tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path)(**inputs).logits.equal(ours(**inputs).logits)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model("mpt").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"cross_attn_every_n_layers": 2}))
    with pytest.raises(ValueError, match=r"missing: lang_encoder\.transformer\.blocks\.1\.gated_cross_attn_layer"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "bert"}}))
    with pytest.raises(ValueError, match=r"text_config\.model_type='bert' is not known"):
        load_pretrained(tmp_path)
