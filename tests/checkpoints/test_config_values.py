"""A config.json with a mistake in it is told by its field, before anything is built of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_fuzzing import FIXTURES, fuzz
from transformers import AutoConfig

from lightning_internvl.checkpoints.official import meta_model
from lightning_internvl.checkpoints.weight_files import read_config
from lightning_internvl.layers.hf_config import make_config

NATIVE = FIXTURES / "hf/internvl_native_qwen2"
LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 8}


def test_a_mutated_config_is_named_or_read(tmp_path: Path) -> None:
    found, faults = fuzz(60, tmp_path, 5, [NATIVE, FIXTURES / "official/llava_15_mlp", FIXTURES / "official/blip2_stage1"])
    assert faults == []
    assert found["named"] > 40


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("hidden_size", -1, "must be a whole number from 1 to 1048576"),
        ("hidden_size", True, "must be a whole number"),
        ("image_size", [28, 0.5], "must be a whole number from 1 to 65536 or a list of such"),
        ("layer_norm_eps", float("nan"), "must be a number from 0 to 1"),
        ("norm_type", None, "must be a text"),
        ("hidden_act", "foo", "must be one of gelu, "),
        ("attention_bias", "false", "must be true or false"),
        ("num_hidden_layers", 10**9, "must be a whole number from 1 to 500"),
    ],
)
def test_a_value_that_no_such_field_has_is_refused(field: str, value: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {field: value}}))
    with pytest.raises(ValueError, match=told) as raised:
        read_config(tmp_path)
    assert f"{tmp_path}/config.json: vision_config.{field}=" in str(raised.value)


def test_sections_are_mappings_and_null_leaves_them_out(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": None, "image_token_id": None, "visual": {"vision_config": None}}))
    assert read_config(tmp_path) == {"image_token_id": None, "visual": {}}
    path.write_text(json.dumps({"text_config": [1]}))
    with pytest.raises(ValueError, match=r"text_config=\[1\] must be a mapping"):
        read_config(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged"):
        read_config(tmp_path)


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    source = FIXTURES / "official/minigpt4"
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "llama_config"}))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json has no llama_config"):
        meta_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "lama"}, "model_type='lama' is no architecture"),
        ({"model_type": None}, "model_type=None is no architecture"),
        ({"hidden_act": "foo"}, "hidden_act='foo' must be one of gelu"),
        ({"rope_scaling": {"rope_type": "foo"}}, "rope_type='foo' is not known; valid choices: default"),
        ({"rope_scaling": 1.5}, "rope_scaling=1.5 must be a mapping"),
        ({"pretraining_tp": 0.5}, "'pretraining_tp'"),
        ({"pad_token_id": 8}, "pad_token_id=8 must be below vocab_size=8"),
        ({"model_type": "qwen2", "num_attention_heads": 32}, "num_attention_heads=32 must be from 1 to hidden_size=16"),
    ],
)
def test_fields_of_which_transformers_makes_no_model_are_named(fields: dict[str, Any], told: str) -> None:
    assert make_config(AutoConfig, LLAMA, "decoder.config").hidden_size == 16
    with pytest.raises(ValueError, match=rf"^decoder\.config.*{told}"):
        make_config(AutoConfig, {**LLAMA, **fields}, "decoder.config")
