"""Live against transformers: LlavaNextForConditionalGeneration and LlavaOnevisionForConditionalGeneration at several
configurations, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_transformers import close, opens_our_folder, opens_what_came_from_nowhere, same_output, same_words
from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from lightning_internvl import load_pretrained

IMAGE, VIDEO = 55, 56
CLIP = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
MAPS = "vision_aspect_ratio"
QWEN = {"model_type": "qwen2"}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NEXT = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
SQUARES = [[12 * rows, 12 * columns] for rows in range(1, 5) for columns in range(1, 5)]
# By name: fields of the top, of the tower, of the language model
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Vicuna": ({}, CLIP, {"model_type": "llama"}),
    "Mistral": ({}, CLIP, {"model_type": "mistral", "sliding_window": None}),
    "Llama 3, tied": ({"tie_word_embeddings": True}, CLIP, {"model_type": "llama", "num_key_value_heads": 1}),
    "two layers, no bias": ({"vision_feature_layer": [-2, 1], "multimodal_projector_bias": False}, CLIP, {"model_type": "llama"}),
    "one grid, a side with a rest": ({"image_grid_pinpoints": [[28, 42]]}, CLIP | {"image_size": 14}, {"model_type": "llama"}),
    "SigLIP": ({"vision_feature_select_strategy": "full", "vision_feature_layer": -1}, SIGLIP, QWEN),
    "OneVision": ({}, SIGLIP, QWEN),
    "OneVision, tied": ({"tie_word_embeddings": True}, SIGLIP, QWEN | {"tie_word_embeddings": True}),
    "OneVision, maps of 2 squares": ({MAPS: "anyres_max_2"}, SIGLIP | {"image_size": 16}, QWEN),
    "OneVision, an earlier layer": ({"vision_feature_layer": -2, MAPS: "anyres_max_4"}, SIGLIP, QWEN),
}  # fmt: skip
Theirs = LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration


def their_model(case: str) -> Theirs:
    """A small model of the library with all parameters drawn anew, so that none is 0 or 1."""
    top, tower, text = CASES[case]
    newer = case.startswith("OneVision")
    side = (TOWER | tower)["image_size"]
    grids = [[side * length // 12 for length in one] for one in (SQUARES if newer else NEXT)]
    fields = {"image_grid_pinpoints": grids, "image_token_index": IMAGE, **({"video_token_index": VIDEO} if newer else {}), **top}
    kind = LlavaOnevisionConfig if newer else LlavaNextConfig
    config = kind(vision_config=TOWER | tower, text_config=TEXT | text, **fields)
    model = (LlavaOnevisionForConditionalGeneration if newer else LlavaNextForConditionalGeneration)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


Piece = int | tuple[int, int] | str
# A row: pieces and padding, negative on the left. A piece: a number of words, the height and width of a picture, or "video".
ROWS: dict[str, list[tuple[list[Piece], int]]] = {
    "pictures, right padding": [([2, (20, 30), 3, (40, 7), 2], 0), ([9], 1), ([4, (100, 90), 4], 1)],
    "pictures, left padding": [([2, (12, 12), 3, (11, 13), 2], 0), ([9], -1), ([4, (7, 300), 4], -1)],
    "text alone": [([8], 0), ([5], -1)],
}
VIDEOS: dict[str, list[tuple[list[Piece], int]]] = {
    "videos": [([2, "video", 3], 1), ([1, "video", 6], 1)],
    "both": [([2, "video", 3, (50, 49), 2], -1), ([(30, 200), 7], -1)],
}
FRAMES = 3


def batch(model: Theirs, rows: list[tuple[list[Piece], int]], alone: bool = False) -> dict[str, Tensor]:
    """The inputs of the library's class.

    Args:
        alone: whether several pictures of a row are single squares, as OneVision has them.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = model.config.vision_config.image_size
    sizes = [[piece for piece in pieces if isinstance(piece, tuple)] for pieces, _ in rows]
    counts = [len(of_row) for of_row in sizes if of_row]
    pictures = [size for of_row in sizes for size in of_row]
    tiles = [
        1 if alone and len(of_row) > 1 else image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, side)
        for of_row in sizes
        for size in of_row
    ]
    films = sum(piece == "video" for pieces, _ in rows for piece in pieces)
    found: dict[str, Tensor] = {}
    lengths = []
    if pictures:
        found["image_sizes"] = torch.tensor(pictures)
        found["pixel_values"] = torch.randn(len(pictures), max(tiles), 3, side, side)
        more = {"batch_num_images": torch.tensor(counts)} if alone else {}
        features = model.get_image_features(**found, **more).pooler_output
        lengths = [len(one) for one in features]
        found |= more
    if films:
        found["pixel_values_videos"] = torch.randn(films, FRAMES, 3, side, side)
        film = model.get_video_features(found["pixel_values_videos"]).pooler_output.shape[1]
    texts, runs = [], iter(lengths)
    for pieces, _ in rows:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids += torch.randint(3, 50, (piece,)).tolist()
            else:
                ids += [VIDEO] * film if piece == "video" else [IMAGE] * next(runs)
        texts.append(ids)
    width = max(len(ids) + abs(padding) for ids, (_, padding) in zip(texts, rows, strict=True))
    ids_BL, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (ids, (_, padding)) in enumerate(zip(texts, rows, strict=True)):
        start = width - len(ids) if padding < 0 else 0
        ids_BL[row, start : start + len(ids)], mask[row, start : start + len(ids)] = torch.tensor(ids), 1
    words = torch.where((mask == 1) & (ids_BL < 50), ids_BL, -100)
    labels = words.masked_fill(torch.cat([torch.zeros(len(rows), 1), mask[:, :-1]], dim=1) == 0, -100)  # no first word
    return found | {"input_ids": ids_BL, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_both_ways(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    newer = case.startswith("OneVision")
    for rows in (ROWS | (VIDEOS if newer else {})).values():
        same_output(ours, theirs, batch(theirs, rows))
    if newer:
        same_output(ours, theirs, batch(theirs, ROWS["pictures, right padding"], alone=True))

    back = opens_our_folder(ours, theirs, tmp_path / "ours")
    inputs = batch(theirs, ROWS["pictures, left padding"])
    assert back(**inputs).logits.equal(theirs(**inputs).logits)


@pytest.mark.parametrize("case", ["Vicuna", "OneVision"])
def test_every_parameter_has_their_gradient(tmp_path: Path, case: str) -> None:
    torch.manual_seed(1)
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    inputs = batch(theirs, VIDEOS["both"] if case == "OneVision" else ROWS["pictures, right padding"])
    for model in (ours, theirs):
        model(**inputs).loss.backward()
    close(ours.middleware.image_newline.grad, theirs.model.image_newline.grad)
    close(ours.middleware.mlp1[0].weight.grad, theirs.model.multi_modal_projector.linear_1.weight.grad)
    table = "embeddings.patch_embedding.weight"
    close(ours.encoder.get_parameter(table).grad, theirs.model.vision_tower.get_parameter(table).grad)


@pytest.mark.parametrize("case", ["Mistral", "OneVision, tied"])
def test_the_same_words_are_written(tmp_path: Path, case: str) -> None:
    torch.manual_seed(2)
    theirs = their_model(case)
    inputs = batch(theirs, [([3, (30, 50), 4], 0), ([5, (12, 40), 2], -1)])
    same_words(theirs, inputs, tmp_path, max_new_tokens=6, min_new_tokens=6)


@pytest.mark.parametrize("case", ["Vicuna", "Mistral", "OneVision, maps of 2 squares"])
def test_a_model_that_came_from_nowhere_is_saved_for_transformers(tmp_path: Path, case: str) -> None:
    torch.manual_seed(4)
    theirs = their_model(case)
    opens_what_came_from_nowhere(theirs, batch(theirs, ROWS["pictures, left padding"]), tmp_path)


def test_tokens_of_pictures_and_videos_under_their_newer_names(tmp_path: Path) -> None:
    theirs = their_model("OneVision")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for kind in ("image", "video"):
        config[f"{kind}_token_id"] = config.pop(f"{kind}_token_index")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_pretrained(tmp_path)
    assert (ours.image_token_id, ours.video_token_id) == (IMAGE, VIDEO)
    ours.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written == config | {"image_token_index": IMAGE, "video_token_index": VIDEO}


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        (
            "Vicuna",
            {"image_grid_pinpoints": [[12, 24], [20, 12]]},
            r"pinpoints=\[\[20, 12\]\] cannot be split .*=12 px",
        ),
        ("Vicuna", {"image_grid_pinpoints": []}, r"grids=\[\] must be one or more pairs of rows and columns"),
        ("Vicuna", {"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ("OneVision", {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio='anyres' is not known; it must be anyres_max_9"),
    ],
)
def test_settings_that_the_parts_do_not_have_are_refused_by_name(
    tmp_path: Path, case: str, change: dict[str, Any], named: str
) -> None:
    their_model(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        load_pretrained(tmp_path)


def test_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    theirs = their_model("Vicuna")
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    inputs = batch(theirs, ROWS["pictures, right padding"])
    with pytest.raises(ValueError, match="pictures need image_sizes"):
        ours(**{name: value for name, value in inputs.items() if name != "image_sizes"})
    with pytest.raises(ValueError, match=r"\(3, 5\) pictures and squares, but by image_sizes they have \[5, 4\] squares"):
        ours(**inputs | {"image_sizes": torch.tensor([[30, 30], [40, 7]])})
    with pytest.raises(ValueError, match=r"this model reads pictures only \(middleware\.frame_pool=null\)"):
        ours(**inputs | {"pixel_values_videos": torch.zeros(1, 2, 3, 12, 12)})
    ours.middleware.skipped = 0
    with pytest.raises(ValueError, match="no square grid; tokens before the patches must be left out"):
        ours(**inputs)
