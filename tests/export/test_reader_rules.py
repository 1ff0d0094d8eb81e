"""Exports keep the rules of vLLM and llama.cpp, and each rule is broken by a folder without what it asks for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_internvl.export.reader_rules import RULES, check_rules
from lightning_internvl.export.report import ExportReport

Exported = Callable[..., tuple[Path, ExportReport]]


def test_windows_of_another_size_are_for_vllm_alone(exported: Exported) -> None:
    folder, _ = exported("qwen2_5_vl_toy")
    (line,) = check_rules(folder, "qwen2_5_vl", ("vllm",))
    assert line.endswith("rules of its source hold")
    with pytest.raises(ValueError, match=r"window_size=48, .* of the tower: llama\.cpp has .*window_size=112"):
        check_rules(folder, "qwen2_5_vl", ("llama_cpp",))


@pytest.mark.parametrize(("recipe", "layout"), [("llava_toy", "llava_native"), ("qwen2_vl_toy", "qwen2_vl")])
def test_exports_keep_them(exported: Exported, recipe: str, layout: str) -> None:
    folder, _ = exported(recipe)
    assert check_rules(folder, layout, ()) == []
    (line,) = check_rules(folder, layout, ("vllm",))
    assert line.startswith("vllm: ")
    assert line.endswith("rules of its source hold")
    (line,) = check_rules(folder, layout, ("llama_cpp",))
    assert ("its own converter makes no projector of this folder" in line) == (layout == "llava_native")


CONFIG = {
    "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "vision_feature_layer": -1,
    "downsample_ratio": 0.5,
    "text_config": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 5.0, "rope_parameters": {"rope_theta": 5.0}},
    "vision_config": {"architectures": ["InternVisionModel"], "hidden_size": 8, "num_hidden_layers": 2, "hidden_act": "gelu"},
}  # fmt: skip
TOKENS = {f"{name}_token": "<x>" for name in ("start_image", "end_image", "context_image", "video")}


def write(folder: Path, config: dict, tokens: dict) -> Path:
    for name, value in (
        ("config", config),
        ("tokenizer_config", tokens),
        ("preprocessor_config", {"image_mean": 1, "image_std": 1}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize(("path", "named"), [
    ("architectures", "vllm: asks for a class that it has in architectures (vllm/model_executor/models/registry.py"),
    ("text_config.architectures", "models/utils.py init_vllm_registered_model)"),
    ("text_config.rope_theta", "llama_cpp: asks for rope_theta beside rope_parameters (conversion/base.py"),
    ("vision_config.architectures", "InternVisionModel in the architectures of vision_config (conversion/__init__.py"),
])  # fmt: skip
def test_a_field_that_is_missing_is_named_with_its_source(tmp_path: Path, path: str, named: str) -> None:
    config = json.loads(json.dumps(CONFIG))
    assert len(check_rules(write(tmp_path, config, TOKENS), "internvl_native", ("vllm", "llama_cpp"))) == 2
    owner, _, field = path.rpartition(".")
    (config[owner] if owner else config).pop(field)
    with pytest.raises(ValueError, match="the export failed its check:") as caught:
        check_rules(write(tmp_path, config, TOKENS), "internvl_native", ("vllm", "llama_cpp"))
    assert named in str(caught.value)


def test_weights_and_tokens(tmp_path: Path) -> None:
    write(tmp_path, CONFIG, TOKENS | {"video_token": None})
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"video_token of the tokenizer(?s:.*)no other \*\.safetensors beside the weights"):
        check_rules(tmp_path, "internvl_native", ("vllm",))


def test_what_llama_cpp_computes_otherwise(tmp_path: Path) -> None:
    tower = CONFIG["vision_config"] | {"norm_type": "rms_norm"}
    with pytest.raises(ValueError, match="llama_cpp: the tower, 8 wide with 2 blocks, has rms_norm"):
        check_rules(write(tmp_path, CONFIG | {"vision_config": tower}, TOKENS), "internvl_native", ("llama_cpp",))


def test_each_rule_names_its_source() -> None:
    assert all(rule.source.count(" ") == 1 and ".py " in rule.source for rules in RULES.values() for rule in rules)
