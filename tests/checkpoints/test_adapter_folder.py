"""A folder of adapters opened as a model, beside what PEFT computes from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lightning_internvl import load_pretrained
from lightning_internvl.config.consent import Untrusted

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE = FIXTURES / "hf/llava_llama"
INPUTS = {"input_ids": torch.tensor([[1, 4, 5, 6]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


def adapted(folder: Path, base: Path, more: str = "", **options: Any) -> None:
    """Adapters with numbers of their own, as PEFT saves them."""
    torch.manual_seed(0)
    stock = AutoModelForImageTextToText.from_pretrained(BASE)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|up_proj)" + more, **options)
    wrapped = get_peft_model(stock, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(kind in name for kind in ("lora_B", "lora_embedding", "modules_to_save", ".bias")):
                parameter.normal_(std=0.3)
            elif "magnitude" in name:
                parameter.mul_(1.5)
    wrapped.save_pretrained(folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": str(base)}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"modules_to_save": ["linear_2"]},
        {"use_dora": True, "more": "|.*embed_tokens|.*patch_embedding"},
        {"bias": "all", "more": "|.*linear_1"},
        {"more": "|.*embed_tokens|.*patch_embedding|.*vision_tower.*k_proj"},
    ],
    ids=["plain", "patterns", "whole tensors", "DoRA", "biases", "tables and convolutions"],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning", "ignore:Setting .save_embedding_layers.")
def test_base_and_adapters_are_put_together(tmp_path: Path, options: dict[str, Any]) -> None:
    adapted(tmp_path / "adapters", BASE, **options)
    theirs = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(BASE), tmp_path / "adapters"
    ).merge_and_unload()
    ours = load_pretrained(tmp_path / "adapters")
    with torch.no_grad():
        torch.testing.assert_close(ours(**INPUTS).logits, theirs(**INPUTS).logits, rtol=1e-4, atol=1e-5)
    projector = theirs.model.multi_modal_projector.linear_2.weight
    assert ours.middleware.mlp1[2].weight.equal(projector)
    ours.save_pretrained(tmp_path / "whole")  # a model of its own
    assert load_pretrained(tmp_path / "whole")(**INPUTS).logits.equal(ours(**INPUTS).logits)


def test_adapters_of_llava_bring_what_the_base_lacks(tmp_path: Path) -> None:
    """As LLaVA's fine-tuning writes them: a language model as base, the projector beside the adapters."""
    tensors = load_file(FIXTURES / "official/llava_15_mlp/model.safetensors")
    outer = ("model.mm_projector.", "model.vision_tower.")
    more = {f"base_model.model.{name}": tensors.pop(name) for name in [*tensors] if name.startswith(outer)}
    base, folder, name = tmp_path / "vicuna", tmp_path / "lora", "model.layers.0.self_attn.q_proj.weight"
    base.mkdir()
    folder.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, base / "model.safetensors")
    shutil.copy(FIXTURES / "official/llava_15_mlp/config.json", folder)
    torch.save(more, folder / "non_lora_trainables.bin")
    a, b = torch.randn(2, tensors[name].shape[1]), torch.randn(len(tensors[name]), 2)
    halves = {f"base_model.model.{name[:-7]}.lora_{half}.weight": x for half, x in (("A", a), ("B", b))}
    save_file(halves, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "base_model_name_or_path": "lmsys/vicuna"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    ours = load_pretrained(folder)
    torch.testing.assert_close(ours.decoder.lm.get_parameter(name), tensors[name] + b @ a / 2)
    assert ours.middleware.mlp1[0].weight.equal(more["base_model.model.model.mm_projector.0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "adapters that name no base"),
        (
            {"base_model_name_or_path": "some/model"},
            r"holds adapters without their base; .* give trust=\[some/model\]\), or put its folder",
        ),
        ({"use_dora": True}, "q_proj lacks the lora_magnitude_vector of use_dora=true"),
        ({"lora_bias": True}, "adapters with lora_bias=True, which are not put together here; merge them"),
        ({"init_lora_weights": "pissa_niter_4"}, "adapters with init_lora_weights='pissa_niter_4', which are not"),
        ({"peft_type": "IA3"}, r"adapters of the kind IA3; merge them into their base first \(PeftModel"),
        ({"peft_type": "PREFIX_TUNING"}, "adapters of the kind PREFIX_TUNING; .* cannot become weights: use them with PEFT"),
        ({"base_model_name_or_path": str(FIXTURES / "hf/internvl_native_qwen2")}, "do not fit their base"),
    ],
)
def test_what_cannot_be_put_together_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "base_model_name_or_path": str(BASE)} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 5), f"{name}.lora_B.weight": torch.ones(5, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises((ValueError, Untrusted), match=message):
        load_pretrained(tmp_path)


def test_adapters_on_adapters_are_named(tmp_path: Path) -> None:
    for name, base in (("first", BASE), ("second", tmp_path / "first")):
        (tmp_path / name).mkdir()
        said = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(said))
        save_file({"x.lora_A.weight": torch.ones(1)}, tmp_path / name / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"first holds adapters for .*llava_llama, no whole model; merge them"):
        load_pretrained(tmp_path / "second")


def test_adapters_beside_a_whole_model_are_named(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(BASE)}))
    with pytest.raises(ValueError, match=r"holds adapters .* and a whole model \(model.safetensors\); move one of them away"):
        load_pretrained(tmp_path / "model")
