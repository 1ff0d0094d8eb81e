"""Tables of words that are one, two, or one too few, in the layouts of chat models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.tied_tables import said_to_be_tied

FIXTURES = Path(__file__).parents[1] / "fixtures"
UNTIED = {
    "hf/internvl_native_6b_style": "language_model.lm_head.weight",
    "hf/llava_llama": "language_model.lm_head.weight",
    "hf/qwen2_vl_image": "lm_head.weight",
    "hf/deepseek_vl_hybrid": "lm_head.weight",
    "hf/instructblip_llama": "language_model.lm_head.weight",
    "official/internvl_chat_two_mlp": "lm_head.weight",
    "official/llava_15_mlp": "lm_head.weight",
    "official/minigpt4": "llama_model.lm_head.weight",
    "official/qwen_vl_lm": "lm_head.weight",
}


def copy_of(fixture: str, folder: Path, change: Any = None, **fields: Any) -> Path:
    tensors = load_file(FIXTURES / fixture / "model.safetensors")
    if change:
        change(tensors)
    config = json.loads((FIXTURES / fixture / "config.json").read_text()) | fields
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("fixture", UNTIED)
def test_a_lost_head_is_named_and_not_taken_for_a_tied_one(tmp_path: Path, fixture: str) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[min((name for name in tensors if name.endswith("lm_head.weight")), key=len)]

    folder = copy_of(fixture, tmp_path / "lost", drop)
    with pytest.raises(ValueError, match=rf"1 missing: [\w.]*{UNTIED[fixture]}, and the config does not say that it is tied"):
        load_pretrained(folder)


def test_a_file_of_other_names_is_told_by_all_of_them(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            tensors[f"base_model.model.{name}"] = tensors.pop(name)

    with pytest.raises(ValueError, match=r"(?s)missing: .* unexpected: base_model\.model\."):
        load_pretrained(copy_of("hf/internvl_native_6b_style", tmp_path / "wrapped", rename))


@pytest.mark.parametrize("equal", [True, False])
def test_two_tables_that_the_config_ties(tmp_path: Path, equal: bool) -> None:
    """Equal ones become one; different ones stay two, as in transformers, and are saved as such."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        prefix = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        table = tensors[prefix]
        head = "lm_head.weight" if prefix.startswith("model.") else "language_model.lm_head.weight"
        tensors[head] = table.clone() if equal else table + 1.0

    folder = copy_of("hf/internvl_native_qwen2", tmp_path / "both", add)
    model = load_pretrained(folder)
    table, head = model.decoder.lm.get_input_embeddings().weight, model.decoder.lm.get_output_embeddings().weight
    assert model.decoder.tied is equal
    assert (head is table) is equal
    assert head.equal(table if equal else table + 1.0)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert {config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]} == {equal}
    again = load_pretrained(tmp_path / "saved").decoder
    assert again.tied is equal
    assert again.lm.get_output_embeddings().weight.equal(head)


def test_one_word_of_a_config_is_enough_and_an_architecture_speaks_where_it_is_silent() -> None:
    decoder = load_pretrained(FIXTURES / "hf/internvl_native_qwen2").decoder
    assert said_to_be_tied({"tie_word_embeddings": False, "llm_config": {"tie_word_embeddings": True}}, decoder)
    assert not said_to_be_tied({"text_config": {"tie_word_embeddings": False}}, decoder)
    assert not said_to_be_tied({"text_config": {}}, decoder)
