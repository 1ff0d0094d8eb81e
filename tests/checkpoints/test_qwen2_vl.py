"""Live against transformers: Qwen2VLForConditionalGeneration and Qwen2_5_VLForConditionalGeneration at several configurations,
there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_transformers import close, opens_our_folder, opens_what_came_from_nowhere, same_output, same_words
from qwen_rows import IMAGE, ROWS as COMMON, VIDEO, Row, rows_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import qwen2_5_vl, qwen2_vl

PATCH = {"patch_size": 6, "temporal_patch_size": 2}
OLDER = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, **PATCH}
NEWER = {"depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32, "window_size": 24,
         "fullatt_block_indexes": [1], "tokens_per_second": 3, **PATCH}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "as published": ({}, {}, False),
    "tied": ({}, {}, True),
    "gelu, other angles": ({"hidden_act": "gelu", "rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}}, {}, True),
    "merging 3 x 3": ({"spatial_merge_size": 3, "depth": 1}, {"num_key_value_heads": 1}, False),
    "three frames a step": ({"temporal_patch_size": 3, "mlp_ratio": 3}, {"num_hidden_layers": 1}, False),
    "2.5, as published": (NEWER, {}, False),
    "2.5, tied": (NEWER, {}, True),
    "2.5, windows alone": (NEWER | {"fullatt_block_indexes": [], "hidden_act": "gelu"}, {}, True),
    "2.5, windows of one block, uneven": (NEWER | {"window_size": 23, "fullatt_block_indexes": [0, 2]}, {}, False),
    "2.5, merging 3 x 3": (NEWER | {"spatial_merge_size": 3, "window_size": 40}, {"num_key_value_heads": 1}, False),
    "2.5, full layers beyond the last": (NEWER | {"depth": 2, "fullatt_block_indexes": [1, 7, 15]}, {}, False),
}
Theirs = Qwen2VLForConditionalGeneration | Qwen2_5_VLForConditionalGeneration


def their_model(case: str) -> Theirs:
    """A small model of the library with all parameters drawn anew, so that none is 0 or 1."""
    vision, text, tied = CASES[case]
    newer = case.startswith("2.5")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]}
    config = (Qwen2_5_VLConfig if newer else Qwen2VLConfig)(
        vision_config=vision if newer else OLDER | vision,
        text_config={"vocab_size": 60, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                     "max_position_embeddings": 256, "rope_parameters": rope, **sizes, **text},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=57, vision_end_token_id=58, tie_word_embeddings=tied,
    )  # fmt: skip
    model = (Qwen2_5_VLForConditionalGeneration if newer else Qwen2VLForConditionalGeneration)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def layout_of(model: Theirs) -> qwen2_vl.Qwen2VL:
    return qwen2_5_vl.LAYOUT if isinstance(model, Qwen2_5_VLForConditionalGeneration) else qwen2_vl.LAYOUT


def batch(model: Theirs, *rows: Row) -> dict[str, Tensor]:
    """Rows with a picture's run for each picture and video."""
    found = rows_of(model, list(rows), lambda token, t, patches: [57, *[token] * (t * patches), 58])
    if (grids := found.get("video_grid_thw")) is not None and model.config.model_type == "qwen2_5_vl":
        found["second_per_grid_ts"] = torch.tensor([0.5, 1.7, 2.0])[: len(grids)]
    return found


ROWS = COMMON | {"a long video of small frames": [([2, (VIDEO, 7, 1, 2), 3], 1)]}


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

    back = opens_our_folder(ours, theirs, tmp_path / "ours")
    inputs = batch(theirs, *ROWS["both"])
    assert back(**inputs).logits.equal(theirs(**inputs).logits)
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {layout_of(theirs).canonical(n) for n in saved} == set(load_file(tmp_path / "ours" / "model.safetensors"))


@pytest.mark.parametrize("case", ["tied", "2.5, tied"])
@pytest.mark.parametrize("kind", ["pictures, left padding", "both", "larger"])
def test_same_gradients(tmp_path: Path, kind: str, case: str) -> None:
    torch.manual_seed(1)
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, inputs = load_pretrained(tmp_path / "theirs"), batch(theirs, *ROWS[kind])
    theirs(**inputs).loss.backward()
    ours(**inputs).loss.backward()
    gradients = layout_of(theirs).official_tensors(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    expected = {layout_of(theirs).canonical(name): p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys() - {"lm_head.weight"}
    for name, gradient in gradients.items():
        close(gradient, expected[name])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", ["as published", "2.5, as published"])
@pytest.mark.parametrize("kind", ["pictures, left padding", "both", "text alone"])
def test_same_generated_tokens(tmp_path: Path, kind: str, beams: int, case: str) -> None:
    torch.manual_seed(2)
    theirs = their_model(case)
    same_words(theirs, batch(theirs, *ROWS[kind]), tmp_path, max_new_tokens=8, min_new_tokens=8, num_beams=beams)


@pytest.mark.parametrize("case", ["as published", "2.5, as published"])
def test_the_flat_config_and_names_of_the_first_release(tmp_path: Path, case: str) -> None:
    torch.manual_seed(3)
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {k: v for k, v in text.items() if k not in ("model_type", "layer_types", "dtype")} | config
    flat |= {
        "vision_token_id": 59,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    flat["vision_config"].pop("rope_parameters", None)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(flat))
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    save_file(
        {layout_of(theirs).canonical(name): tensor for name, tensor in weights.items()}, tmp_path / "old" / "model.safetensors"
    )
    ours, inputs = load_pretrained(tmp_path / "old"), batch(theirs, *ROWS["both"])
    seen = inputs["attention_mask"].bool()
    close(ours(**inputs).logits[seen], theirs(**inputs).logits[seen])
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == flat
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert back(**inputs).logits.equal(theirs(**inputs).logits)


@pytest.mark.parametrize("case", ["gelu, other angles", "2.5, windows of one block, uneven"])
def test_a_model_that_came_from_nowhere_is_saved_for_transformers(tmp_path: Path, case: str) -> None:
    torch.manual_seed(4)
    theirs = their_model(case)
    opens_what_came_from_nowhere(theirs, batch(theirs, *ROWS["both"]), tmp_path)


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        ("tied", {"text_config": {"use_sliding_window": True}}, "text_config.use_sliding_window"),
        ("tied", {"vision_config": {"patch_size": [6, 7]}}, "vision_config.patch_size"),
        ("tied", {"vision_config": {"hidden_act": "silu"}}, "activation='silu'"),
        ("2.5, tied", {"vision_config": {"window_size": 11}}, "window=11 px holds no block of 12 px"),
        ("2.5, tied", {"vision_config": {"fullatt_block_indexes": [-1]}}, r"full_layers=\[-1\] do not exist; with depth=3"),
        ("2.5, tied", {"vision_config": {"hidden_act": "relu"}}, "activation='relu'"),
    ],
)
def test_settings_that_the_parts_do_not_have_are_refused_by_name(
    tmp_path: Path, case: str, change: dict[str, Any], named: str
) -> None:
    their_model(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for section, fields in change.items():
        config[section] |= fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        (None, r"videos need second_per_grid_ts.*decoder\.tokens_per_second=3"),
        ([0.5], "second_per_grid_ts has 1 values for 3 videos"),
        ([0.5, -1.0, 2.0], r"second_per_grid_ts has -1\.0: time must go on"),
        ([0.5, float("nan"), 2.0], "second_per_grid_ts has nan"),
    ],
)
def test_videos_need_a_time_that_goes_on(tmp_path: Path, seconds: list[float] | None, named: str) -> None:
    theirs = their_model("2.5, tied")
    theirs.save_pretrained(tmp_path)
    inputs = batch(theirs, *ROWS["videos"]) | {"second_per_grid_ts": None if seconds is None else torch.tensor(seconds)}
    with pytest.raises(ValueError, match=named):
        load_pretrained(tmp_path)(**inputs)
