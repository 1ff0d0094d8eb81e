"""Recipes exported: read back by what loads them, complete, and with the files that servers and benchmarks ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import llava_native
from lightning_internvl.config.targets import build
from lightning_internvl.export import check, reload
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.export.write import export
from lightning_internvl.inference.load_run import open_run
from lightning_internvl.layers.state_dict import own_tensors

Exported = Callable[..., tuple[Path, ExportReport]]
NATIVE = {
    "internvl_1_5_toy": ("internvl_native", "InternVLProcessor"),
    "internvl_2_5_toy": ("internvl_native", "InternVLProcessor"),
    "internvl_3_5_toy": ("internvl_native", "InternVLProcessor"),
    "llava_toy": ("llava_native", "LlavaProcessor"),
    "llava_next_toy": ("llava_next", "LlavaNextProcessor"),
    "llava_onevision_toy": ("llava_onevision", "LlavaOnevisionProcessor"),
    "qwen2_vl_toy": ("qwen2_vl", "Qwen2VLProcessor"),
    "qwen2_5_vl_toy": ("qwen2_5_vl", "Qwen2_5_VLProcessor"),
    "qwen3_vl_toy": ("qwen3_vl", "Qwen3VLProcessor"),
    "blip2_toy": ("blip2_hf", "Blip2Processor"),
    "instructblip_toy": ("instructblip_hf", "InstructBlipProcessor"),
    "deepseek_vl_toy": ("deepseek_vl_hf", "DeepseekVLHybridProcessor"),
}
OWN = {
    "internvl_toy": "handoff", "internvl_chat_toy": "internvl_chat_llava", "internvl_retrieval_toy": "internvl_14b",
    "internvl_probe_toy": "handoff", "minigpt4_toy": "minigpt4", "qwen_vl_toy": "qwen_vl", "xcomposer_toy": "xcomposer1",
    "xcomposer2_toy": "xcomposer2", "flamingo_toy": "open_flamingo", "clip_toy": "handoff", "clip_rn50_toy": "handoff",
}  # fmt: skip


def fields(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("recipe", NATIVE)
def test_transformers_computes_the_same(exported: Exported, recipe: str) -> None:
    folder, report = exported(recipe)
    layout, processor = NATIVE[recipe]
    assert report.layout == layout
    assert report.loader.startswith("transformers.")
    assert report.worst <= 1e-5
    assert len(report.logits) >= 2
    assert report.processor.startswith(f"{processor}: same ids for 3 prompts")
    assert report.tensors <= len(own_tensors(load_pretrained(folder)))
    assert not list(folder.parent.glob(".*.draft"))


@pytest.mark.parametrize("recipe", OWN)
def test_other_systems_come_back_through_this_library(exported: Exported, recipe: str) -> None:
    folder, report = exported(recipe)
    assert report.layout == OWN[recipe]
    assert report.loader.startswith("lightning_internvl.load_pretrained")
    assert report.worst <= 1e-6
    assert "from lightning_internvl import load_pretrained" in (folder / "README.md").read_text()


def test_clip_with_an_end_token_that_transformers_understands_is_native(exported: Exported) -> None:
    """2 stands for "the largest id" there, so the toy recipe, whose end token is 2, is not."""
    folder, report = exported("clip_toy", "middleware.eos_token_id=11")
    assert (report.layout, report.loader) == ("clip", "transformers.CLIPModel")
    assert report.processor.startswith("CLIPProcessor: pixels within")
    assert fields(folder, "processor_config.json") == {"processor_class": "CLIPProcessor"}


def test_half_the_size(exported: Exported) -> None:
    folder, report = exported("llava_toy", dtype="bfloat16", max_shard_bytes=2 * 10**6)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) >= 2
    with safe_open(shards[0], framework="pt") as opened:
        assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.bfloat16}  # noqa: SIM118 - not a dict
    assert fields(folder, "config.json")["dtype"] == "bfloat16"
    assert 0 < report.rounding <= check.ROUNDING["bfloat16"]
    assert report.worst <= check.LIMIT


def test_the_card(make_run: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_run(make_run("llava_toy"), build)
    export(opened, tmp_path / "out", ExportOptions(licence="other", licence_link="LICENSE.txt"))
    head, text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1:]
    assert yaml.safe_load(head) == {
        "license": "other", "license_link": "LICENSE.txt", "library_name": "transformers", "pipeline_tag": "image-text-to-text",
    }  # fmt: skip
    assert "# llava_toy" in text
    assert "| supervised | answers_accuracy | 0.5 | 0.25 |" in text
    assert "| alignment | chats | not known | 16 | `middleware` |" in text  # its hand-off is not there
    assert "| supervised | chats | 1 | 16 |" in text
    assert "AutoProcessor" in text


@pytest.mark.parametrize("recipe", ["llava_toy", "instructblip_toy", "deepseek_vl_toy"])
def test_the_code_of_the_card_runs(exported: Exported, recipe: str, monkeypatch: Any, capsys: Any) -> None:
    folder, _ = exported(recipe)
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    picture = Image.new("RGB", (90, 70), "red")
    picture.save("picture.png")
    capsys.readouterr()
    exec(code, {"picture": picture})
    assert capsys.readouterr().out.strip()


def test_an_answer_ends_where_training_ended_it(exported: Exported) -> None:
    folder, _ = exported("blip2_toy")
    tokenizer, ends = AutoTokenizer.from_pretrained(folder), fields(folder, "generation_config.json")["eos_token_id"]
    assert [tokenizer.decode([i]) for i in ends] == ["\n", "</s>"]


@pytest.mark.parametrize(
    ("recipe", "words", "layout"),
    [
        ("internvl_3_5_toy", ["decoder=qwen3_moe_toy"], "internvl_native"),  # files hold a tensor for each expert
        ("internvl_3_toy", [], "internvl_native"),  # a model in use counts visual tokens as words
        ("internvl_3_toy", ["decoder.visual_step=0.5"], "handoff"),  # which no other layout says
    ],
)
def test_other_decoders_of_internvl(exported: Exported, recipe: str, words: list[str], layout: str) -> None:
    _, report = exported(recipe, *words)
    assert report.layout == layout
    assert report.worst <= 1e-5


def test_the_card_names_base_models_of_the_hub_only() -> None:
    from lightning_internvl.export.card import base_models

    run = {"init_from": "OpenGVLab/InternVL-14B-224px", "decoder": {"pretrained": "lmsys/vicuna-7b-v1.5"}, "encoder": {}}
    assert base_models(run) == ["OpenGVLab/InternVL-14B-224px", "lmsys/vicuna-7b-v1.5"]
    assert base_models({"init_from": "/home/me/run", "decoder": {"pretrained": "tests/export"}}) == []


# --- what other programs read -----------------------------------------------------------------------------------------

# vLLM: `interns1.py` (native InternVL), `llava.py`, `qwen2_vl.py`, `qwen2_5_vl.py`; lmms-eval: `llava_hf.py`,
# `qwen2_vl.py`, which take the folder through AutoConfig, AutoProcessor and the tokenizer's chat template. Neither is run here.
SERVED = {
    "internvl_1_5_toy": (
        {"downsample_ratio", "image_token_id", "vision_config", "text_config"},
        {"min_patches", "max_patches", "crop_to_patches"},
    ),
    "internvl_3_5_toy": (
        {"downsample_ratio", "image_token_id", "vision_config", "text_config"},
        {"min_patches", "max_patches", "crop_to_patches"},
    ),
    "llava_toy": ({"image_token_index", "vision_feature_layer", "vision_feature_select_strategy"}, {"crop_size"}),
    "llava_next_toy": ({"image_token_index", "image_grid_pinpoints", "vision_feature_layer"}, {"image_grid_pinpoints"}),
    "llava_onevision_toy": (
        {"image_token_index", "video_token_index", "image_grid_pinpoints", "vision_aspect_ratio"},
        {"image_grid_pinpoints"},
    ),
    "qwen2_vl_toy": (
        {"image_token_id", "video_token_id", "vision_config"},
        {"patch_size", "merge_size", "min_pixels", "max_pixels"},
    ),
    "qwen2_5_vl_toy": (
        {"image_token_id", "video_token_id", "vision_config"},
        {"patch_size", "merge_size", "min_pixels", "max_pixels"},
    ),
}
ARCHITECTURES = {
    "internvl_1_5_toy": "InternVLForConditionalGeneration", "llava_toy": "LlavaForConditionalGeneration",
    "internvl_3_5_toy": "InternVLForConditionalGeneration",
    "llava_next_toy": "LlavaNextForConditionalGeneration",
    "llava_onevision_toy": "LlavaOnevisionForConditionalGeneration",
    "qwen2_vl_toy": "Qwen2VLForConditionalGeneration", "qwen2_5_vl_toy": "Qwen2_5_VLForConditionalGeneration",
}  # fmt: skip

PART_CLASSES = {
    "internvl_1_5_toy": (["LlamaForCausalLM"], ["InternVisionModel"]),
    "internvl_3_5_toy": (["Qwen3ForCausalLM"], ["InternVisionModel"]),
    "llava_toy": (["LlamaForCausalLM"], None),  # llama.cpp takes the class of the whole for a tower of CLIP
    "llava_next_toy": (["LlamaForCausalLM"], None),
    "llava_onevision_toy": (["Qwen2ForCausalLM"], None),
    "qwen2_vl_toy": (["Qwen2VLForConditionalGeneration"], None),
    "qwen2_5_vl_toy": (["Qwen2_5_VLForConditionalGeneration"], None),
}


@pytest.mark.parametrize("recipe", SERVED)
def test_files_and_fields_that_vllm_and_lmms_eval_read(exported: Exported, recipe: str) -> None:
    folder, _ = exported(recipe)
    top, image = SERVED[recipe]
    config = fields(folder, "config.json")
    assert config["architectures"] == [ARCHITECTURES[recipe]]
    assert top <= set(config)
    assert image | {"size", "image_mean", "image_std", "image_processor_type"} <= set(fields(folder, "preprocessor_config.json"))
    assert fields(folder, "processor_config.json")["processor_class"] == NATIVE[recipe][1]
    # without these transformers 4 takes its defaults, and llama.cpp and vLLM find no class for a part
    text, vision = config["text_config"], config["vision_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert (text["architectures"], vision.get("architectures")) == PART_CLASSES[recipe]
    assert {vision.get("num_channels", vision.get("in_channels")), config["torch_dtype"]} == {3, "float32"}
    assert isinstance(fields(folder, "tokenizer_config.json")["extra_special_tokens"], dict)
    assert AutoConfig.from_pretrained(folder).vision_config.patch_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= config["text_config"]["vocab_size"]
    ends = fields(folder, "generation_config.json")["eos_token_id"]
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    # lmms-eval marks pictures in plain text; the placeholder is then one token, which the processor repeats.
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat?"}], tokenize=False, add_generation_prompt=True
    )
    placeholder = config.get("image_token_id", config.get("image_token_index"))
    assert tokenizer(text, add_special_tokens=False).input_ids.count(placeholder) == 1


@pytest.mark.parametrize(("recipe", "tower"), [
    ("llava_toy", "vision_tower.vision_model."), ("deepseek_vl_toy", "model.vision_model.vision_model."),
])  # fmt: skip
def test_towers_have_the_names_of_published_files(exported: Exported, recipe: str, tower: str) -> None:
    """transformers 4, vLLM and llama.cpp know CLIP and SigLIP in a chat model by these alone."""
    folder, _ = exported(recipe)
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert f"{tower}embeddings.patch_embedding.weight" in opened.keys()  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("recipe", ["qwen2_vl_toy", "qwen2_5_vl_toy", "qwen3_vl_toy"])
def test_tokens_that_frame_a_picture_are_named_where_its_place_is_found_by_them(exported: Exported, recipe: str) -> None:
    folder, _ = exported(recipe)
    config, tokenizer = fields(folder, "config.json"), AutoTokenizer.from_pretrained(folder)
    found = [config[f"vision_{name}_token_id"] for name in ("start", "end")]
    assert tokenizer.convert_ids_to_tokens(found) == ["<|vision_start|>", "<|vision_end|>"]


def test_the_released_internvl_layout_says_how_pictures_are_cut(exported: Exported) -> None:
    """vLLM reads these of `InternVLChatModel` (`internvl.py`)."""
    folder, report = exported("internvl_1_5_toy", "data.chats_collate.template=chatml", layout="internvl_chat")
    config = fields(folder, "config.json")
    assert (config["template"], config["system_message"]) == ("internvl2_5", "")
    assert "auto_map" not in config
    assert [note.partition(" ")[2][:26] for note in report.notes] == ["official InternVLChatModel", "chat() begins with an empt"]
    assert fields(folder, "preprocessor_config.json")["size"] == {"height": 48, "width": 48}
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        # its class ties none; here it is one again
        assert "language_model.lm_head.weight" in opened.keys()  # noqa: SIM118 - not a dict
    assert load_pretrained(folder).decoder.tied
    assert report.layout == "internvl_chat"
    assert config["architectures"] == ["InternVLChatModel"]
    wanted = {"min_dynamic_patch": 1, "max_dynamic_patch": 4, "use_thumbnail": True, "dynamic_image_size": True}
    assert {name: config[name] for name in wanted} == wanted
    assert (config["force_image_size"], config["select_layer"], config["downsample_ratio"]) == (48, -1, 0.5)


# --- faults -------------------------------------------------------------------------------------------------------------


def test_a_dropped_tensor_is_found_and_nothing_is_left(make_run: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    official = llava_native.LAYOUT.official_tensors

    def forgetful(*arguments: Any) -> dict[str, Any]:
        return {name: t for name, t in official(*arguments).items() if name != "multi_modal_projector.linear_1.weight"}

    monkeypatch.setattr(llava_native.LAYOUT, "official_tensors", forgetful)
    with pytest.raises(ValueError, match=r"1 lost: middleware\.mlp1\.0\.weight"):
        export(open_run(make_run("llava_toy"), build), tmp_path / "out", ExportOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_changed_tensor_is_found_and_nothing_is_left(make_run: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    official = llava_native.LAYOUT.official_tensors

    def careless(*arguments: Any) -> dict[str, Any]:
        tensors = official(*arguments)
        name = "language_model.model.layers.1.mlp.up_proj.weight"
        return tensors | {name: torch.where(torch.arange(tensors[name].shape[1]) == 3, 1.001, 1.0) * tensors[name]}

    monkeypatch.setattr(llava_native.LAYOUT, "official_tensors", careless)
    with pytest.raises(ValueError, match=r"1 changed: decoder\.lm\.model\.layers\.1\.mlp\.up_proj\.weight"):
        export(open_run(make_run("llava_toy"), build), tmp_path / "out", ExportOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_another_computation_is_found(make_run: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    load = reload.load_stock

    def other(folder: Path, *arguments: Any) -> Any:
        config = fields(folder, "config.json")
        (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -1}))
        return load(folder, *arguments)

    monkeypatch.setattr(reload, "load_stock", other)
    with pytest.raises(ValueError, match=r"logits \(wide picture\) differ by"):
        export(open_run(make_run("llava_toy"), build), tmp_path / "out", ExportOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
