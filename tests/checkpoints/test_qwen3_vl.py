"""Live against transformers: Qwen3VLForConditionalGeneration and Qwen3VLMoeForConditionalGeneration at several
configurations, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_transformers import close, opens_our_folder, opens_what_came_from_nowhere, same_output, same_words
from qwen_rows import IMAGE, ROWS, VIDEO, Row, rows_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import qwen3_vl, qwen3_vl_moe

VISION = {"depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32, "patch_size": 6,
          "temporal_patch_size": 2, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "as published": ({}, {}, False),
    "tied": ({}, {}, True),
    "gelu, other angles": ({"hidden_act": "gelu", "rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}}, {}, True),
    "merging 3 x 3": ({"spatial_merge_size": 3, "num_position_embeddings": 4}, {"num_key_value_heads": 1}, False),
    "three frames a step": ({"temporal_patch_size": 3}, {"attention_bias": True}, False),
    "every layer of both": ({"deepstack_visual_indexes": [0, 1, 2]}, {"num_hidden_layers": 3}, True),
    "no deep layers": ({"deepstack_visual_indexes": []}, {"num_hidden_layers": 1}, False),
    "wide heads, one position": ({"num_position_embeddings": 1}, {"head_dim": 16}, False),
    "experts": ({}, EXPERTS, False),
    "experts, tied, dense layers among them": ({}, EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [1]}, True),
    "experts, as many as they are wide": ({}, EXPERTS | {"moe_intermediate_size": 16}, False),  # square matrices
}
Theirs = Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration


def their_model(case: str) -> Theirs:
    """A small model of the library with all parameters drawn anew, so that none is 0 or 1."""
    vision, text, tied = CASES[case]
    moe = case.startswith("experts")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    width = text.get("head_dim", 8)
    section = {8: [2, 1, 1], 16: [4, 2, 2]}[width]
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": section, "mrope_interleaved": True}
    config = (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(
        vision_config=VISION | vision,
        text_config={"vocab_size": 60, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                     "max_position_embeddings": 256, "rope_parameters": rope, "tie_word_embeddings": tied, **sizes, **text},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=57, vision_end_token_id=58, tie_word_embeddings=tied,
    )  # fmt: skip
    model = (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def layout_of(model: Theirs) -> qwen3_vl.Qwen3VL:
    return qwen3_vl_moe.LAYOUT if isinstance(model, Qwen3VLMoeForConditionalGeneration) else qwen3_vl.LAYOUT


def batch(model: Theirs, *rows: Row) -> dict[str, Tensor]:
    """Rows in which a video gives two words, as of a time, and a picture's run for each step."""

    def shown(token: int, t: int, patches: int) -> list[int]:
        ids: list[int] = []
        for _ in range(t):
            ids += [*(torch.randint(3, 50, (2,)).tolist() if token == VIDEO else ()), 57, *[token] * patches, 58]
        return ids

    return rows_of(model, list(rows), shown)


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_both_ways(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    for rows in ROWS.values():
        inputs = batch(theirs, *rows)
        theirs.model.rope_deltas = None
        same_output(ours, theirs, inputs)

    opens_our_folder(ours, theirs, tmp_path / "ours")
    saved, written = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert saved.keys() == written.keys()
    assert all(tensor.equal(turned(name, written[name], case)) for name, tensor in saved.items())
    assert load_pretrained(tmp_path / "ours")(**inputs).logits.equal(ours(**inputs).logits)
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert again == first


def turned(name: str, tensor: Tensor, case: str) -> Tensor:
    """A tensor of a released file as the library writes one of a fresh model."""
    even = CASES[case][1].get("moe_intermediate_size") == 16 and name.endswith("gate_up_proj")  # square: as it is
    return tensor.transpose(1, 2) if ".mlp.experts." in name and not even else tensor


@pytest.mark.parametrize("case", ["tied", "every layer of both", "experts"])
@pytest.mark.parametrize("kind", ["pictures, left padding", "both", "larger"])
def test_same_gradients(tmp_path: Path, kind: str, case: str) -> None:
    torch.manual_seed(1)
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, inputs = load_pretrained(tmp_path / "theirs"), batch(theirs, *ROWS[kind])
    theirs(**inputs).loss.backward()
    ours(**inputs).loss.backward()
    gradients = layout_of(theirs).official_tensors(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    for name, gradient in gradients.items():
        close(gradient, expected[name])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", ["as published", "every layer of both", "experts"])
@pytest.mark.parametrize("kind", ["pictures, left padding", "both", "text alone"])
def test_same_generated_tokens(tmp_path: Path, kind: str, beams: int, case: str) -> None:
    torch.manual_seed(2)
    theirs = their_model(case)
    same_words(theirs, batch(theirs, *ROWS[kind]), tmp_path, max_new_tokens=8, min_new_tokens=8, num_beams=beams)


@pytest.mark.parametrize("case", ["as published", "experts"])
def test_the_config_of_the_release(tmp_path: Path, case: str) -> None:
    """With fields of before transformers 5, and the kind of the whole for the tower."""
    torch.manual_seed(3)
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rope
    config["vision_config"]["model_type"] = config["model_type"]
    config["vision_config"].pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, inputs = load_pretrained(tmp_path), batch(theirs, *ROWS["both"])
    seen = inputs["attention_mask"].bool()
    close(ours(**inputs).logits[seen], theirs(**inputs).logits[seen])
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == config


@pytest.mark.parametrize("case", ["gelu, other angles", "no deep layers", "experts, tied, dense layers among them"])
def test_a_model_that_came_from_nowhere_is_saved_for_transformers(tmp_path: Path, case: str) -> None:
    torch.manual_seed(4)
    theirs = their_model(case)
    opens_what_came_from_nowhere(theirs, batch(theirs, *ROWS["both"]), tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_config": {"attention_dropout": 0.1}}, "text_config.attention_dropout"),
        ({"text_config": {"rope_parameters": {"mrope_interleaved": False}}}, "rope_parameters.mrope_interleaved=False"),
        ({"text_config": {"rope_parameters": {"mrope_section": [1, 1, 1]}}}, r"mrope_section=\[1, 1, 1\].*sum 4"),
        ({"vision_config": {"patch_size": [6, 7]}}, "vision_config.patch_size"),
        ({"vision_config": {"hidden_act": "silu"}}, "activation='silu'"),
        ({"vision_config": {"num_position_embeddings": 24}}, "num_position_embeddings=24.*must be a square"),
        ({"vision_config": {"deepstack_visual_indexes": [0, 1, 2]}}, r"feeds blocks \[2\] of a decoder that has 0 to 1"),
    ],
)
def test_settings_that_the_parts_do_not_have_are_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    their_model("tied").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for section, fields in change.items():
        rope = {"rope_parameters": config[section]["rope_parameters"] | fields.get("rope_parameters", {})}
        config[section] |= fields | rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        load_pretrained(tmp_path)
