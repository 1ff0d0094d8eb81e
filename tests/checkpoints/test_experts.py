"""Experts: one tensor for each in published files, one for all of a block in memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_native import BATCHES, close, their_model
from transformers import InternVLForConditionalGeneration

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import all_layouts
from lightning_internvl.checkpoints.families.experts import number_of_experts
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.plan.kernels import Unfilled

QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}  # fmt: skip


@pytest.fixture
def native(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    their_model("qwen3_moe", "300M style", False, -1).save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def test_released_files_hold_a_tensor_for_each_expert(tmp_path: Path, native: Path) -> None:
    model = load_pretrained(native)
    model.save_pretrained(tmp_path / "released", layout="internvl_chat")
    files = load_file(tmp_path / "released" / "model.safetensors")
    block = "language_model.model.layers.0.mlp"
    kinds = [f"{block}.experts.{i}.{kind}_proj.weight" for i in range(6) for kind in ("gate", "up", "down")]
    assert [files[name].shape for name in kinds] == [(24, 32), (24, 32), (32, 24)] * 6
    assert files[f"{block}.gate.weight"].shape == (6, 32)
    assert files["language_model.model.layers.1.mlp.up_proj.weight"].shape == (48, 32)
    config = json.loads((tmp_path / "released" / "config.json").read_text())["llm_config"]
    # the name of the releases before transformers 5, which would take 128 in silence
    assert config["num_experts"] == 6
    again, inputs = load_pretrained(tmp_path / "released"), BATCHES["several tiles"]()
    theirs = InternVLForConditionalGeneration.from_pretrained(native).eval()
    close(again(**inputs).logits, theirs(**inputs).logits)


def test_a_missing_expert_is_named(native: Path) -> None:
    config = json.loads((native / "config.json").read_text())
    config["text_config"]["num_local_experts"] = 7
    (native / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"3 missing: language_model\.model\.layers\.0\.mlp\.experts\.6\.down_proj"):
        load_pretrained(native)


def test_a_folder_that_is_cut_off_within_a_block_is_named(native: Path) -> None:
    file = native / "model.safetensors"
    tensors = {name: x for name, x in load_file(file).items() if not re.search(r"experts\.[345]\.", name)}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"9 missing: language_model\.model\.layers\.0\.mlp\.experts\.3\.down_proj"):
        load_pretrained(native)
    cut = HFCausalLM(config=QWEN3_MOE)
    cut.lm.save_pretrained(native / "words")
    file = native / "words" / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if "experts.3." not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.pretrained=.*words cannot be loaded: "):
        HFCausalLM(pretrained=str(native / "words"))


@pytest.mark.parametrize(("fields", "count"), [({"num_experts": 4}, 4), ({"num_local_experts": 5}, 5), ({}, 128)])
def test_the_number_of_experts_has_two_names_and_a_default(fields: dict[str, int], count: int) -> None:
    assert number_of_experts({"model_type": "qwen3_moe", **fields}) == count


def test_the_largest_published_model_has_its_published_number_of_parameters() -> None:
    layout = all_layouts()["internvl_chat"]
    tower = {"num_hidden_layers": 45, "image_size": 448}  # InternViT-6B, which the layout's defaults describe
    text = {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "head_dim": 128, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "num_experts": 128, "vocab_size": 151936,
    }  # fmt: skip
    config = {"ps_version": "v2", "vision_config": tower, "llm_config": text}
    with torch.device("meta"), Unfilled():
        model = layout.build(config, {"language_model.lm_head.weight": (151936, 4096)})
    files = layout.official_tensors(config, own_tensors(model))
    assert sum(tensor.numel() for tensor in files.values()) == 240_699_370_368  # of InternVL3_5-241B-A28B on the hub
    assert sum(".mlp.experts." in name for name in files) == 94 * 128 * 3
