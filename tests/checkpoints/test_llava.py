"""LLaVA: live against transformers in both directions, and the layout of LLaVA's own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_transformers import close
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import llava, llava_native
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.middleware.connector import LinearConnector, MLPConnector
from lightning_internvl.model.vlm import VLM

FIXTURES = Path(__file__).parents[1] / "fixtures" / "official"
IMAGE = 59
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"num_hidden_layers": 3, "hidden_size": 24, "image_size": 24, "patch_size": 6}
CASES = {
    "1.5": {},
    "the last layer with CLS, no biases": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
    },
    "two layers, tied": {"vision_feature_layer": [-2, 1], "text": {"tie_word_embeddings": True}},
    "SigLIP and Qwen2": {
        "vision": {"model_type": "siglip_vision_model"},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text": {"model_type": "qwen2", "num_key_value_heads": 2},
    },
}


def their_model(case: str) -> LlavaForConditionalGeneration:
    options = dict(CASES[case])
    vision = VISION | {"model_type": "clip_vision_model"} | options.pop("vision", {})
    text = SIZES | {"model_type": "llama", "vocab_size": 60, "max_position_embeddings": 128, "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2} | options.pop("text", {})
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16, **options)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def batch(tokens: int, *rows: tuple[int, int]) -> dict[str, Tensor]:
    """Rows of (pictures, words), filled up on the left."""
    width = max(tokens * pictures + words for pictures, words in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (pictures, words) in enumerate(rows):
        text = torch.randint(3, IMAGE, (words,)).tolist()
        whole = torch.tensor([text[0], *[IMAGE] * tokens * pictures, *text[1:]])
        ids[row, width - len(whole) :], mask[row, width - len(whole) :] = whole, 1
    labels = torch.where((mask == 1) & (ids != IMAGE), ids, -100)
    pixels = torch.randn(sum(pictures for pictures, _ in rows), 3, 24, 24)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_both_ways(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    tokens = ours.middleware.tokens_out(ours.encoder.num_tokens())
    inputs = batch(tokens, (1, 6), (2, 5), (0, 7))
    expected, found, seen = theirs(**inputs), ours(**inputs), inputs["attention_mask"].bool()
    close(found.logits[seen], expected.logits[seen])
    close(found.loss, expected.loss)
    prompt = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert ours.generate(**prompt, **options).equal(theirs.generate(**prompt, **options)[:, seen.shape[1] :])

    ours.save_pretrained(tmp_path / "ours")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    state = theirs.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in back.state_dict().items())
    assert back(**inputs).logits.equal(expected.logits)


def test_same_gradients(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = their_model("1.5")
    theirs.save_pretrained(tmp_path)
    ours, inputs = load_pretrained(tmp_path), batch(16, (1, 6), (2, 5))
    theirs(**inputs).loss.backward()
    ours(**inputs).loss.backward()
    gradients = llava_native.LAYOUT.official_tensors(
        ours.config, {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    )
    expected = {llava_native.LAYOUT.canonical(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])


def test_older_names_of_the_library_are_known() -> None:
    names = {
        "vision_tower.vision_model.embeddings.class_embedding": "vision_tower.embeddings.class_embedding",
        "model.vision_tower.pre_layrnorm.bias": "vision_tower.pre_layrnorm.bias",
        "model.language_model.norm.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.position_ids": None,
    }
    assert {name: llava_native.LAYOUT.canonical(name) for name in names} == names


@pytest.mark.parametrize("fixture", ["llava_v1_linear", "llava_15_mlp"])
def test_own_layout_both_ways(tmp_path: Path, fixture: str) -> None:
    model = load_pretrained(FIXTURES / fixture)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == model.config
    there, here = (dict(WeightFiles(f).tensors(torch.device("cpu"))) for f in (FIXTURES / fixture, tmp_path / "saved"))
    assert there.keys() == here.keys()
    assert all(tensor.equal(here[name]) for name, tensor in there.items())


def own_layout(folder: Path, **changes: Any) -> Path:
    """The fixture of 1.5 with a config as published: LLaMA's fields at the top, the tower by name."""
    shutil.copytree(FIXTURES / "llava_15_mlp", folder)
    config = json.loads((folder / "config.json").read_text())
    flat = config.pop("text_config") | config | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    del flat["vision_config"]
    (folder / "config.json").write_text(json.dumps(flat | changes))
    return folder


def test_a_published_config_and_a_tower_by_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "HEAD_DIM", 8)  # towers that OpenAI released have 64
    ours = load_pretrained(own_layout(tmp_path / "flat", tokenizer_model_max_length=64))
    expected = load_pretrained(FIXTURES / "llava_15_mlp")
    assert ours.image_placeholders.max_length == 64
    ids, pixels = torch.tensor([[1, -200, 5, 6]]), torch.randn(1, 3, 30, 30)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    assert ours(**inputs).logits.equal(expected(**inputs).logits)


def test_prompts_of_different_length_are_continued_alike(tmp_path: Path) -> None:
    model = load_pretrained(FIXTURES / "llava_15_mlp")
    rows, pixels = [[1, -200, 5, 6, 9], [1, 4, 7]], torch.randn(1, 3, 30, 30)
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    for row, text in enumerate(rows):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    together = model.generate(pixel_values=pixels, input_ids=ids, attention_mask=mask, **options)
    for row, text in enumerate(rows):
        alone = model.generate(pixel_values=pixels[: 1 - row], input_ids=torch.tensor([text]), **options)
        assert alone[0].equal(together[row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "identity"}, "mm_projector_type='identity' is not known"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature='cls' is not known"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA 1.6"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad' is not supported"),
    ],
)
def test_settings_that_the_parts_lack_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pretrained(own_layout(tmp_path / "flat", **changes))


def made(encoder: CLIPViT, connector: str = "mlp", token: int = IMAGE, **options: Any) -> VLM:
    """A model of parts, as a recipe composes it."""
    decoder = load_pretrained(FIXTURES / "llava_15_mlp").decoder
    kind = LinearConnector if connector == "linear" else MLPConnector
    dims = {"encoder_dim": encoder.dim, "decoder_dim": decoder.dim, "special_tokens": encoder.special_tokens}
    return VLM(encoder, kind(**dims, **options), decoder, image_token_id=token).eval()


TOWER = {"image_size": 24, "patch_size": 6, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}


@pytest.mark.parametrize("tower", [CLIPViT, SiglipViT])
def test_a_trained_model_goes_to_the_library(tmp_path: Path, tower: type[CLIPViT]) -> None:
    torch.manual_seed(2)
    options = {"head": "unused", "post_norm": "unused"} if tower is SiglipViT else {}
    model = made(tower(**TOWER, **options), patch_layer=-1)
    model.save_pretrained(tmp_path / "native")
    inputs = batch(16, (1, 6), (2, 5))
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "native").eval()
    seen = inputs["attention_mask"].bool()
    close(model(**inputs).logits[seen], back(**inputs).logits[seen])


def test_a_linear_connector_goes_to_the_own_layout(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = made(CLIPViT(**TOWER), "linear", patch_layer=-2)
    model.save_pretrained(tmp_path / "own")
    back = load_pretrained(tmp_path / "own")
    tensors = own_tensors(back)
    assert all(tensor.equal(tensors[name]) for name, tensor in own_tensors(model).items() if not name.startswith("objectives"))
    assert back.image_token_id == -200


def test_what_the_library_would_read_otherwise_is_not_saved_for_it() -> None:
    pooled = made(SiglipViT(**TOWER), patch_layer=-1)  # behind the norm, which the library leaves out there
    assert llava_native.LAYOUT.config_of(pooled) is None
    assert llava_native.LAYOUT.config_of(made(CLIPViT(**TOWER), patch_layer=-1, keep_special=True)) is None
    assert llava_native.LAYOUT.config_of(made(CLIPViT(**TOWER), patch_layer=-1)) is not None
