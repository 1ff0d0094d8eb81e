"""What readers of before transformers 5 take from a language model's config, and the installed one still reads alike."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.families.language_model import language_model, older_rope_fields
from lightning_internvl.hub import plain_config

FIXTURE = Path(__file__).parents[1] / "fixtures/hf/internvl_native_qwen2"
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
MROPE = {"mrope_section": [1, 1, 2]}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
CASES = {
    "no scaling": ("qwen2", {"rope_type": "default"}, None),
    "dynamic": ("qwen2", {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}),
    "yarn": ("llama", YARN, {"type": "yarn", **YARN}),
    "three streams": ("qwen2_vl_text", {"rope_type": "default", **MROPE}, {"rope_type": "default", "type": "mrope", **MROPE}),
    "long": ("phi3", {"rope_type": "longrope", "partial_rotary_factor": 0.5, **FACTORS}, {"type": "longrope", **FACTORS}),
}


@pytest.mark.parametrize("case", CASES)
def test_positions_are_said_in_the_older_fields_too(case: str) -> None:
    kind, rope, scaling = CASES[case]
    made = AutoConfig.for_model(kind, **SIZES, max_position_embeddings=256, rope_parameters={"rope_theta": 500.0, **rope})
    fields: dict[str, Any] = plain_config(made)
    older = older_rope_fields(fields)
    assert (older["rope_theta"], older["rope_scaling"]) == (500.0, scaling)
    assert older.get("partial_rotary_factor") == rope.get("partial_rotary_factor")
    again = copy.deepcopy(fields | older)  # transformers writes into these
    del again["model_type"]
    both = AutoConfig.for_model(kind, **again)
    assert {name: both.rope_parameters[name] for name in made.rope_parameters} == made.rope_parameters
    assert older_rope_fields(plain_config(both)) == older


def test_learnt_positions_have_no_such_field() -> None:
    assert older_rope_fields(plain_config(AutoConfig.for_model("opt"))) == {}


def test_a_loaded_config_stays_as_it_was_read() -> None:
    config = {
        "model_type": "qwen2",
        **SIZES,
        "vocab_size": 8,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    kept = copy.deepcopy(config)
    assert language_model(config, tied=False).lm.config.rope_parameters["rope_theta"] == 500.0
    assert config == kept


def test_two_kinds_of_layers_have_a_field_each() -> None:
    rope = {"full_attention": {"rope_theta": 5000.0}, "sliding_attention": {"rope_theta": 300.0}}
    made = AutoConfig.for_model("gemma3_text", **SIZES, rope_parameters=copy.deepcopy(rope))
    fields = plain_config(made)
    older = older_rope_fields(fields)
    assert older == {"rope_theta": 5000.0, "rope_scaling": None, "rope_local_base_freq": 300.0}
    again = AutoConfig.for_model(**copy.deepcopy(fields | older)).rope_parameters
    assert {kind: again[kind]["rope_theta"] for kind in rope} == {kind: rope[kind]["rope_theta"] for kind in rope}


def test_a_loaded_config_keeps_its_rotary_fields(tmp_path: Path) -> None:
    """transformers writes the base of the angles into the scaling that it is given; a saved config has it where it was."""
    shutil.copytree(FIXTURE, tmp_path / "base")
    config = json.loads((FIXTURE / "config.json").read_text())
    del config["text_config"]["rope_parameters"]
    said = {"rope_theta": 5000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    config["text_config"] |= said
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    model = load_pretrained(tmp_path / "base")
    assert model.decoder.lm.config.rope_parameters["rope_theta"] == 5000.0
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())["text_config"]
    assert {name: saved[name] for name in said} == said
