"""Qwen-VL's own layout, there and back: the whole model, its visual part, models made here, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import qwen_vl
from lightning_internvl.decoders.qwen import Qwen
from lightning_internvl.encoders.openclip_vit import OpenCLIPViT
from lightning_internvl.middleware.resampler import Resampler
from lightning_internvl.model.vlm import VLM

FIXTURES = Path(__file__).parents[1] / "fixtures" / "official"
WHOLE, VISUAL = FIXTURES / "qwen_vl_lm", FIXTURES / "qwen_vl_visual"


def edited(tmp_path: Path, **change: Any) -> Path:
    """The whole model with other settings."""
    folder = tmp_path / "edited"
    shutil.copytree(WHOLE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize("folder", [WHOLE, VISUAL], ids=lambda folder: folder.name)
def test_the_same_tensors_and_config_come_back(tmp_path: Path, folder: Path) -> None:
    load_pretrained(folder).save_pretrained(tmp_path / "ours")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("mlp_dim", [50, 51, 120, 129])
def test_a_model_made_here(tmp_path: Path, mlp_dim: int) -> None:
    torch.manual_seed(0)
    config = {
        "model_type": "qwen2", "vocab_size": 60, "hidden_size": 128, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": mlp_dim == 50,
    }  # fmt: skip
    encoder = OpenCLIPViT(image_size=24, patch_size=8, dim=30, depth=2, heads=3, mlp_dim=mlp_dim)
    middleware = Resampler(encoder_dim=30, decoder_dim=128, num_queries=4, special_tokens=0)
    model = VLM(encoder, middleware, Qwen(config=config, seq_length=16, log_n=False), image_token_id=52).eval()
    model.save_pretrained(tmp_path / "ours")
    back = load_pretrained(tmp_path / "ours")
    assert (back.decoder.seq_length, back.decoder.log_n, back.decoder.tied) == (16, False, mlp_dim == 50)
    ids = torch.tensor([[3, 52, 52, 52, 52, *range(4, 20)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 24, 24)}
    assert back(**inputs).logits.equal(model(**inputs).logits)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["visual"]["image_start_id"] == 50


def test_grown_vocabulary_is_written(tmp_path: Path) -> None:
    model = load_pretrained(WHOLE)
    model.decoder.lm.resize_token_embeddings(model.decoder.vocab_size + 5, mean_resizing=False)
    model.save_pretrained(tmp_path / "ours")
    assert load_pretrained(tmp_path / "ours").decoder.vocab_size == 305


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"no_bias": False}, "no_bias=False is not supported"),
        ({"rotary_pct": 0.5}, "rotary_pct=0.5"),
        ({"attn_dropout_prob": 0.1}, "attn_dropout_prob=0.1"),
        ({"kv_channels": 64}, "kv_channels=64 is not supported"),
        ({"num_hidden_layers": 3}, r"missing: lm_head|missing: transformer\.h\.2"),
    ],
    ids=str,
)
def test_what_the_parts_do_not_have(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        load_pretrained(edited(tmp_path, **change))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = edited(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.visual.attn_pool.attn.in_proj_bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing.*attn_pool\.attn\.in_proj_bias"):
        load_pretrained(folder)


def test_parts_that_the_layout_cannot_hold() -> None:
    encoder = OpenCLIPViT(image_size=24, patch_size=8, dim=24, depth=1, heads=3, mlp_dim=20, positions=3)
    resampler = Resampler(encoder_dim=24, decoder_dim=128, num_queries=4, special_tokens=0)
    assert qwen_vl.LAYOUT.config_of(VLM(encoder, resampler)) is None  # a table of another size
    encoder = OpenCLIPViT(image_size=24, patch_size=8, dim=24, depth=1, heads=3, mlp_dim=20)
    narrow = Resampler(encoder_dim=24, decoder_dim=128, num_queries=4, head_dim=32, special_tokens=0)
    assert qwen_vl.LAYOUT.config_of(VLM(encoder, narrow)) is None
    assert qwen_vl.LAYOUT.config_of(VLM(encoder, resampler)) is not None
