"""Live against transformers: InternVLForConditionalGeneration at several configurations, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from beside_transformers import close
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, InternVLVisionModel

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import internvl_native

IMAGE = 50
TOWERS: dict[str, dict[str, Any]] = {
    "300M style": {"norm_type": "layer_norm", "attention_bias": True},
    "6B style": {"norm_type": "rms_norm", "use_qk_norm": True, "layer_norm_eps": 1e-3},
    "layer norm with q/k norm": {"norm_type": "layer_norm", "use_qk_norm": True, "attention_bias": True},
    "rms norm without": {"norm_type": "rms_norm"},
    "final norm": {"norm_type": "layer_norm", "use_mean_pooling": False},
}
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 2},
}
CASES = [
    *(("qwen2", tower, True, -1) for tower in TOWERS),
    *((decoder, "6B style", False, -2) for decoder in DECODERS),
    ("llama", "300M style", True, -1),
]


def their_model(decoder: str, tower: str, tied: bool, layer: int) -> InternVLForConditionalGeneration:
    """A small model of the library with all parameters drawn anew, so that none is 0 or 1."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"model_type": decoder, "vocab_size": 60, "max_position_embeddings": 128, "pad_token_id": 0}
    vision = sizes | {"num_hidden_layers": 3, "hidden_size": 24, "image_size": 24, "patch_size": 6}
    config = InternVLConfig(
        vision_config=vision | TOWERS[tower],
        text_config=text | DECODERS[decoder] | {"tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2},
        image_token_id=IMAGE,
        vision_feature_layer=layer,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def batch(*rows: tuple[int, int, int]) -> dict[str, Tensor]:
    """Rows of (tiles, words, padding; negative on the left) as the library takes them: a tile has 4 placeholders."""
    width = max(4 * tiles + words + abs(padding) for tiles, words, padding in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (tiles, words, padding) in enumerate(rows):
        text = torch.randint(3, IMAGE, (words,)).tolist()
        tokens = torch.tensor([text[0]] + [IMAGE] * 4 * tiles + text[1:])
        start = max(0, -padding)
        ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = tokens, 1
    labels = torch.where((mask == 1) & (ids != IMAGE), ids, -100)
    pixels = torch.randn(sum(tiles for tiles, _, _ in rows), 3, 24, 24)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


BATCHES = {
    "right padding": lambda: batch((1, 6, 4), (2, 6, 0), (0, 7, 7)),
    "left padding": lambda: batch((1, 6, -4), (2, 6, 0), (0, 7, -7)),
    "several tiles": lambda: batch((3, 5, 0), (1, 9, -4)),
}


@pytest.mark.parametrize(("decoder", "tower", "tied", "layer"), CASES, ids=str)
def test_same_numbers_both_ways(tmp_path: Path, decoder: str, tower: str, tied: bool, layer: int) -> None:
    torch.manual_seed(0)
    theirs = their_model(decoder, tower, tied, layer)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    for inputs in (make() for make in BATCHES.values()):
        expected, found = theirs(**inputs), ours(**inputs)
        seen = inputs["attention_mask"].bool()
        close(found.logits[seen], expected.logits[seen])
        close(found.loss, expected.loss)

    ours.save_pretrained(tmp_path / "ours")
    back = InternVLForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert {n: t.shape for n, t in back.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert all(tensor.equal(theirs.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert back(**inputs).logits.equal(theirs(**inputs).logits)


@pytest.mark.parametrize("tower", ["300M style", "6B style"])
def test_same_gradients(tmp_path: Path, tower: str) -> None:
    torch.manual_seed(1)
    theirs = their_model("qwen2", tower, True, -1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, inputs = load_pretrained(tmp_path / "theirs"), BATCHES["left padding"]()
    theirs(**inputs).loss.backward()
    ours(**inputs).loss.backward()
    gradients = internvl_native.LAYOUT.official_tensors(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    expected = {internvl_native.LAYOUT.canonical(name): p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys() - {"language_model.lm_head.weight"}
    for name, gradient in gradients.items():
        close(gradient, expected[name])


@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
def test_same_greedy_tokens(tmp_path: Path, decoder: str) -> None:
    torch.manual_seed(2)
    theirs = their_model(decoder, "6B style", False, -1)
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = {name: tensor for name, tensor in BATCHES["left padding"]().items() if name != "labels"}
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    new = load_pretrained(tmp_path / "theirs").generate(**inputs, **options)
    assert new.equal(theirs.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :])


def test_bfloat16_points_the_same_way(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = their_model("llama", "6B style", False, -1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, inputs = load_pretrained(tmp_path / "theirs", dtype=torch.bfloat16), BATCHES["several tiles"]()
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, found = theirs(**inputs).logits[seen], ours(**inputs).logits[seen]
    assert float(torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)) > 0.999


def test_a_tower_alone(tmp_path: Path) -> None:
    torch.manual_seed(4)
    config = InternVLVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=6,
        norm_type="rms_norm", use_qk_norm=True,
    )  # fmt: skip
    theirs = InternVLVisionModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, pixels = load_pretrained(tmp_path / "theirs"), torch.randn(2, 3, 24, 24)
    close(ours.encoder(pixels)[0], theirs(pixels).last_hidden_state)
    ours.save_pretrained(tmp_path / "ours")
    back = InternVLVisionModel.from_pretrained(tmp_path / "ours").eval()
    assert back(pixels).last_hidden_state.equal(theirs(pixels).last_hidden_state)
