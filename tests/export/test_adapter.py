"""Adapters alone: PEFT puts them on transformers' model, whose logits are then those of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_toys import composed
from safetensors import safe_open

from lightning_internvl.checkpoints.name_rules import joined_rows, match_rules, rename, stacked_rows
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.export.adapter import base_of, export_adapter, split_update
from lightning_internvl.export.peft_model import Update, owning_modules
from lightning_internvl.export.report import ExportOptions
from lightning_internvl.export.write import export
from lightning_internvl.inference.load_run import open_run
from lightning_internvl.model.compose import compose_model

MakeRun = Callable[..., Path]
LORA = ("peft=lora", "peft.decoder.rank=4")
STILL = "{name: middleware.image_newline, frozen: true}"
CASES = {
    "llava": ("llava_toy", *LORA),
    "tower and decoder": ("llava_toy", *LORA, "peft/part@peft.encoder=lora", "peft.encoder.rank=2", "peft.encoder.alpha=6"),
    "dora": ("llava_toy", "peft=dora", "peft.decoder.rank=4"),
    "fused query, key and value": ("internvl_1_5_toy", *LORA, "peft/part@peft.encoder=lora"),
    "internvl_3_5": ("internvl_3_5_toy", *LORA),
    "llava_next": (
        "llava_next_toy",
        *LORA,
        "pipeline=[supervised]",
        f"stages.supervised.module.train=[{STILL},middleware,decoder]",
    ),
    "llava_onevision": (
        "llava_onevision_toy",
        *LORA,
        "pipeline=[onevision]",
        f"stages.onevision.module.train=[{STILL},middleware,decoder]",
    ),
    "qwen2_vl": ("qwen2_vl_toy", *LORA),
    "qwen2_5_vl": ("qwen2_5_vl_toy", *LORA),
    "qwen3_vl": ("qwen3_vl_toy", *LORA),
    "experts": ("internvl_3_5_toy", *LORA, "decoder=qwen3_moe_toy"),
    "embeddings": ("llava_toy", *LORA, "stages.supervised.module.train=[middleware,decoder,decoder.lm.model.embed_tokens]"),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_it_and_computes_the_same(make_run: MakeRun, tmp_path: Path, case: str) -> None:
    opened = open_run(make_run(*CASES[case]), build)
    report = export_adapter(opened, tmp_path / "out", ExportOptions())
    assert report.adapters >= 7
    assert report.loader.startswith("peft.PeftModel on transformers.")
    assert len(report.logits) == 3
    assert report.worst <= 1e-5
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as opened_file:
        names = list(opened_file.keys())
    assert all(".lora_" in name or any(module in name for module in settings["modules_to_save"]) for name in names)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PeftModel.from_pretrained(base" in card
    # the card counts what was trained, and the whole of each part
    model = opened.view.model
    updates = sum(p.numel() for n, p in model.decoder.named_parameters() if "lora_" in n)
    assert report.parts["decoder"][1] >= updates > 0
    assert report.parts["decoder"][0] > report.parts["decoder"][1]
    assert f"| {report.parts['encoder'][0]:,} | {report.parts['encoder'][1]:,} |" in card


def test_a_tensor_that_peft_cannot_save_alone_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    opened = open_run(make_run("llava_next_toy", *LORA), build)
    with pytest.raises(ValueError, match=r"model\.image_newline belongs to no layer of its own.*adapter=false"):
        export_adapter(opened, tmp_path / "out", ExportOptions())
    assert export(opened, tmp_path / "merged", ExportOptions()).worst <= 1e-5


def test_merged_it_is_one_plain_folder(make_run: MakeRun, tmp_path: Path) -> None:
    report = export(open_run(make_run(*CASES["dora"], "peft/part@peft.encoder=lora"), build), tmp_path / "out", ExportOptions())
    assert report.loader == "transformers.LlavaForConditionalGeneration"
    assert report.rounding <= 1e-5  # the adapters beside the merged weights
    assert report.worst <= 1e-5


def test_a_quantized_base_is_merged_as_what_it_stands_for(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("llava_toy", "peft=qlora", "peft.decoder.rank=4")
    report = export(open_run(run, build), tmp_path / "out", ExportOptions())
    assert report.loader == "transformers.LlavaForConditionalGeneration"
    assert report.worst <= 1e-5
    assert export_adapter(open_run(run, build), tmp_path / "alone", ExportOptions()).worst <= 1e-5


@pytest.mark.parametrize(("layout", "named", "first"), [
    (None, "BASE_IN_THE_SAME_LAYOUT", None),
    ("internvl_chat", "base", 'load_pretrained("BASE").save_pretrained("base")'),
])  # fmt: skip
def test_a_base_that_transformers_does_not_open_is_written_first(
    tmp_path: Path, layout: str | None, named: str, first: str | None
) -> None:
    model = compose_model(stage_settings(composed("internvl_1_5_toy"), "sft").parts.config, build)[0]
    model.save_pretrained(tmp_path / "start", layout=layout)
    assert base_of(str(tmp_path / "start")) == (named, first)
    assert base_of(None) == base_of(str(tmp_path)) == ("BASE_IN_THE_SAME_LAYOUT", None)
    assert base_of("OWNER/NAME") == ("OWNER/NAME", None)


def group_of(*rules: object, names: tuple[str, ...]) -> object:
    return match_rules(rules, names)[0][0]


def test_rows_that_are_joined_here_share_one_a() -> None:
    update = Update(torch.randn(2, 5), torch.randn(9, 2), 4.0, torch.rand(9))
    group = group_of(joined_rows("x.qkv.weight", "x.q.weight", "x.k.weight", "x.v.weight"), names=("x.qkv.weight",))
    parts = split_update("x.qkv", update, group)
    assert list(parts) == ["x.q.weight", "x.k.weight", "x.v.weight"]
    assert all(part.a is update.a and part.alpha == 4.0 for part in parts.values())
    assert torch.cat([part.b for part in parts.values()]).equal(update.b)
    assert torch.cat([part.magnitude for part in parts.values()]).equal(update.magnitude)


def test_a_renamed_layer_keeps_its_adapter() -> None:
    update = Update(torch.randn(2, 5), torch.randn(9, 2), 4.0)
    parts = split_update("a.w1", update, group_of(rename("a.w1.*", "b.up.*"), names=("a.w1.weight",)))
    assert parts["b.up.weight"].b.equal(update.b)
    assert parts["b.up.weight"].magnitude is None


def test_layers_that_are_one_there_have_no_place_for_an_adapter() -> None:
    group = group_of(stacked_rows(("q.weight", "k.weight"), "qk.weight"), names=("q.weight", "k.weight"))
    with pytest.raises(ValueError, match=r"the adapter of q has no place of its own: qk\.weight"):
        split_update("q", Update(torch.randn(2, 5), torch.randn(9, 2), 4.0), group)


def test_modules_inside_others_are_saved_with_them() -> None:
    names = ["a.class_embedding", "a.position.weight", "b.proj.weight", "b.proj.bias"]
    assert owning_modules(names) == ["a", "b.proj"]


def test_a_run_without_adapters(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no adapters; train with peft=lora"):
        export_adapter(open_run(make_run("llava_toy"), build), tmp_path / "out", ExportOptions())


def test_a_system_that_transformers_does_not_have(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter=true needs a layout that transformers loads, and minigpt4 is none"):
        export_adapter(open_run(make_run("minigpt4_toy", *LORA), build), tmp_path / "out", ExportOptions())
    assert not (tmp_path / "out").exists()


def test_adapters_of_an_earlier_stage_are_in_the_weights(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("llava_toy", *LORA, "+stages.alignment.peft.decoder.rank=8")
    with pytest.raises(ValueError, match="the adapters of stage alignment on decoder were added to the weights"):
        export_adapter(open_run(run, build), tmp_path / "out", ExportOptions())
