"""DeepSeek-VL: live against transformers in both variants, there and back; the authors' own layout there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
)

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import deepseek_vl, deepseek_vl_hf

IMAGE = 50
TEXT = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 24, "patch_size": 12, "hidden_act": "gelu", "vision_use_head": False,
}  # fmt: skip
SAM = {
    "model_type": "sam_vision_model", "hidden_size": 24, "output_channels": 5, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 40, "patch_size": 8, "mlp_dim": 30, "window_size": 2, "global_attn_indexes": [1],
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "1.3B style": {},
    "tied": {"tied": True},
    "with a head that nothing reads": {"siglip": {"vision_use_head": True}},
    "tanh and another eps": {"siglip": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-4}},
    "7B style": {"sam": {}},
    "several global blocks": {"sam": {"global_attn_indexes": [0, 2], "window_size": 3}, "tied": True},
    "no distances": {"sam": {"use_rel_pos": False, "qkv_bias": False}},
    "no map": {"sam": {"use_abs_pos": False, "mlp_dim": None, "mlp_ratio": 2.0}},
}


def their_model(siglip: dict[str, Any] | None = None, sam: dict[str, Any] | None = None, tied: bool = False) -> Any:
    """A small model of the library with all parameters drawn anew, so that none is 0 or 1."""
    common = {"vision_config": SIGLIP | (siglip or {}), "text_config": TEXT | {"tie_word_embeddings": tied}}
    common |= {"image_token_id": IMAGE, "tie_word_embeddings": tied}
    if sam is None:
        model = DeepseekVLForConditionalGeneration(DeepseekVLConfig(**common))
    else:
        config = DeepseekVLHybridConfig(**common, high_res_vision_config=SAM | sam)
        model = DeepseekVLHybridForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def batch(hybrid: bool, side: str) -> dict[str, Tensor]:
    """Three rows, of one, two and no pictures; a picture has 4 placeholders."""
    rows = []
    for pictures, words in ((1, 6), (2, 5), (0, 7)):
        text = torch.randint(3, IMAGE, (words,)).tolist()
        rows.append(text[:1] + [IMAGE] * 4 * pictures + text[1:])
    width = max(map(len, rows)) + 1
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    labels = torch.where((mask == 1) & (ids != IMAGE), ids, -100)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.randn(3, 3, 24, 24)}
    return found | ({"high_res_pixel_values": torch.randn(3, 3, 40, 40)} if hybrid else {})


def close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours.detach() - theirs.detach()).abs().max()) <= 2e-5 * float(theirs.detach().abs().max()) + 1e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_numbers_both_ways(tmp_path: Path, variant: str) -> None:
    torch.manual_seed(0)
    theirs, hybrid = their_model(**VARIANTS[variant]), "sam" in VARIANTS[variant]
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    for side in ("left", "right"):
        inputs = batch(hybrid, side)
        expected, found, seen = theirs(**inputs), ours(**inputs), inputs["attention_mask"].bool()
        close(found.logits[seen], expected.logits[seen])
        close(found.loss, expected.loss)

    ours.save_pretrained(tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert {n: t.shape for n, t in back.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert all(tensor.equal(theirs.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert back(**inputs).logits.equal(theirs(**inputs).logits)
    written, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == {deepseek_vl_hf.LAYOUT.published(name) for name in wanted}


@pytest.mark.parametrize("variant", ["1.3B style", "7B style"])
def test_same_gradients_and_tokens(tmp_path: Path, variant: str) -> None:
    torch.manual_seed(1)
    theirs, hybrid = their_model(**VARIANTS[variant]), "sam" in VARIANTS[variant]
    theirs.save_pretrained(tmp_path / "theirs")
    ours, inputs = load_pretrained(tmp_path / "theirs"), batch(hybrid, "left")
    theirs(**inputs).loss.backward()
    ours(**inputs).loss.backward()
    gradients = deepseek_vl_hf.LAYOUT.official_tensors(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])
    inputs.pop("labels")
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    new = ours.generate(**inputs, **options)
    assert new.equal(theirs.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("variant", ["1.3B style", "7B style"])
def test_a_model_without_a_config_makes_one_that_transformers_loads(tmp_path: Path, variant: str) -> None:
    torch.manual_seed(2)
    theirs, hybrid = their_model(**VARIANTS[variant]), "sam" in VARIANTS[variant]
    theirs.save_pretrained(tmp_path / "theirs")
    ours, inputs = load_pretrained(tmp_path / "theirs"), batch(hybrid, "right")
    ours.config = None
    ours.save_pretrained(tmp_path / "ours", layout="deepseek_vl_hf")
    assert type(theirs).from_pretrained(tmp_path / "ours").eval()(**inputs).logits.equal(theirs(**inputs).logits)


def test_a_batch_without_pictures_reaches_both_towers(tmp_path: Path) -> None:
    their_model(sam={}).save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[3, 4, 5]])
    empty = {"pixel_values": torch.zeros(0, 3, 24, 24), "high_res_pixel_values": torch.zeros(0, 3, 40, 40)}
    ours(ids, torch.ones_like(ids), labels=ids, **empty).loss.backward()
    assert all(p.grad is not None for p in ours.encoder.parameters())


@pytest.mark.parametrize(
    ("variant", "field", "problem"),
    [
        ("1.3B style", {"vision_config": {"model_type": "clip_vision_model"}}, r"vision_config\.model_type='clip_vision_model'"),
        ("7B style", {"high_res_vision_config": {"attention_dropout": 0.1}}, r"high_res_vision_config\.attention_dropout=0.1"),
    ],
)
def test_what_the_parts_do_not_have(tmp_path: Path, variant: str, field: dict[str, Any], problem: str) -> None:
    their_model(**VARIANTS[variant]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, change in field.items():
        config[part] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=problem):
        load_pretrained(tmp_path)


# --- the authors' own layout --------------------------------------------------------------------------------------------


def released(hybrid: bool) -> dict[str, Any]:
    """A config that names its towers, as the release does."""
    low = {"model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1, "image_size": 24}
    params = {"concat_type": "tuple", "high_res_cfg": {"model_name": "sam_b_downsample"}, "low_res_cfg": low}
    kind = "low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu"
    return {
        "model_type": "multi_modality",
        "image_token_id": IMAGE,
        "vision_config": {"cls": "HybridVisionTower" if hybrid else "CLIPVisionTower", "params": params if hybrid else low},
        "aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "projector_type": kind}},
        "language_config": TEXT,
    }


@pytest.mark.parametrize("hybrid", [False, True], ids=["1.3B style", "7B style"])
def test_the_released_layout_there_and_back(tmp_path: Path, hybrid: bool) -> None:
    torch.manual_seed(3)
    sizes = {"siglip": {"num_attention_heads": 16, "intermediate_size": 40}} | ({"sam": {}} if hybrid else {})
    theirs = their_model(**sizes)
    theirs.save_pretrained(tmp_path / "native")
    model = load_pretrained(tmp_path / "native")
    config, folder = released(hybrid), tmp_path / "released"
    tensors = deepseek_vl.LAYOUT.official_tensors(config, model.state_dict())
    tower = "vision_model.vision_tower_low.vision_tower." if hybrid else "vision_model.vision_tower."
    assert {f"{tower}blocks.1.attn.qkv.bias", f"{tower}pos_embed", "language_model.lm_head.weight"} <= tensors.keys()
    if hybrid:
        high = "vision_model.vision_tower_high.vision_tower."
        assert {f"{high}patch_embed.proj.weight", f"{high}neck_hd.3.bias", f"{high}blocks.0.mlp.lin1.weight"} <= tensors.keys()
        assert {f"{high}downsamples.1.weight", f"{high}hd_alpha_downsamples", "aligner.layers.1.weight"} <= tensors.keys()
    unused = {f"{tower}attn_pool.q.weight": torch.ones(3), "vision_model.high_layer_norm.weight": torch.ones(3)}
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in (tensors | unused).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))

    ours, inputs = load_pretrained(folder), batch(hybrid, "left")
    seen = inputs["attention_mask"].bool()
    close(ours(**inputs).logits[seen], theirs(**inputs).logits[seen])
    ours.save_pretrained(tmp_path / "again", layout="deepseek_vl")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(tensor.equal(tensors[name]) for name, tensor in again.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    ours.save_pretrained(tmp_path / "to_native")  # transformers reads it from then on
    back = type(theirs).from_pretrained(tmp_path / "to_native").eval()
    close(back(**inputs).logits[seen], theirs(**inputs).logits[seen])


def test_other_projectors_and_missing_towers_are_refused(tmp_path: Path) -> None:
    config = released(True)
    with pytest.raises(ValueError, match=r"lacks vision_model\.vision_tower_low\.vision_tower\.patch_embed\.proj\.weight"):
        deepseek_vl.LAYOUT.build(config, {})
    config["aligner_config"]["params"]["projector_type"] = "linear"
    with pytest.raises(ValueError, match="projector_type='linear' is not supported"):
        deepseek_vl.LAYOUT.build(config, {})
    assert not deepseek_vl.LAYOUT.recognises({**config, "gen_vision_config": {}}, {})  # Janus
